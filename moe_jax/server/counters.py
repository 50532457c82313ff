"""What the server counts, for Prometheus. Imports no jax."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Upper bounds of the histograms' buckets."""


class Counters:
    """The numbers of one server, in a registry of their own."""

    def __init__(self) -> None:
        # The library switches its *_created series for all registries at once.
        prometheus_client.disable_created_metrics()
        self.registry = own = CollectorRegistry()
        requests = "Answered requests; status 499: the client left."
        self.requests = Counter("moe_jax_requests", requests, ("endpoint", "status"), registry=own)
        self.queue_length = Gauge("moe_jax_queue_length", "Texts that wait for a place in the batch.", registry=own)
        self.running = Gauge("moe_jax_running", "Texts in the batch.", registry=own)
        self.prompt_tokens = Counter("moe_jax_prompt_tokens", "Tokens of accepted prompts.", registry=own)
        self.generated_tokens = Counter("moe_jax_generated_tokens", "Tokens generated.", registry=own)
        first = "From a completion's arrival to its first token."
        self.first_token = Histogram("moe_jax_time_to_first_token_seconds", first, buckets=SECONDS, registry=own)
        whole = "From a completion's arrival to its end."
        self.duration = Histogram("moe_jax_request_duration_seconds", whole, buckets=SECONDS, registry=own)

    def render(self) -> bytes:
        """The text of /metrics."""
        return prometheus_client.generate_latest(self.registry)
