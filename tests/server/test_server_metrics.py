"""The text of /metrics, worked by hand."""

from moe_jax.server.metrics import Histogram, Metrics


def test_a_histogram_counts_up():
    histogram = Histogram((0.5, 2.0))
    for value in (0.25, 0.5, 1.0, 4.0):
        histogram.observe(value)
    assert list(histogram.lines("x")) == [
        'x_bucket{le="0.5"} 2',
        'x_bucket{le="2.0"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 5.75",
        "x_count 4",
    ]


def test_every_sample_stands_below_its_kind():
    metrics = Metrics()
    metrics.requests["/v1/completions", 200] = 3
    metrics.prompt_tokens = 7
    metrics.first_token.observe(0.02)
    kind = None
    for line in metrics.render().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
        elif not line.startswith("#"):
            assert line.split()[0].split("{")[0].removesuffix("_bucket").startswith(name)
            float(line.split()[-1])
    assert kind == "histogram"
    assert 'moe_jax_requests_total{endpoint="/v1/completions",status="200"} 3\n' in metrics.render()
    assert "\nmoe_jax_prompt_tokens_total 7\n" in metrics.render()
    assert metrics.render().endswith("\n")
