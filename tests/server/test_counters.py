"""The text of /metrics: names, labels and buckets that dashboards rely on."""

from moe_jax.server.counters import SECONDS, Counters


def test_the_text_of_metrics():
    counters = Counters()
    counters.requests.labels("/v1/completions", 200).inc(3)
    counters.prompt_tokens.inc(7)
    counters.running.set_function(lambda: 2)
    counters.first_token.observe(0.02)
    lines = counters.render().decode().splitlines()
    kinds = dict(line.split()[2:] for line in lines if line.startswith("# TYPE "))
    assert kinds == {
        "moe_jax_requests_total": "counter",
        "moe_jax_queue_length": "gauge",
        "moe_jax_running": "gauge",
        "moe_jax_prompt_tokens_total": "counter",
        "moe_jax_generated_tokens_total": "counter",
        "moe_jax_time_to_first_token_seconds": "histogram",
        "moe_jax_request_duration_seconds": "histogram",
    }
    assert 'moe_jax_requests_total{endpoint="/v1/completions",status="200"} 3.0' in lines
    assert {"moe_jax_prompt_tokens_total 7.0", "moe_jax_running 2.0", "moe_jax_queue_length 0.0"} <= set(lines)
    buckets = [line for line in lines if line.startswith("moe_jax_time_to_first_token_seconds_bucket")]
    bounds = [*map(str, SECONDS), "+Inf"]
    assert [line.split('"')[1] for line in buckets] == bounds
    assert [line.split()[-1] for line in buckets] == ["0.0"] * 2 + ["1.0"] * 14
    assert not any("_created" in line for line in lines)
    # Another server in the process counts for itself.
    assert b'status="200"' not in Counters().render()
