"""What the server counts, in the text format of Prometheus. Imports no jax."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
"""Upper bounds of the histograms' buckets."""


class Histogram:
    """How many values were at most each bound; as Prometheus has it, a bucket counts those of the smaller ones too."""

    def __init__(self, bounds: Sequence[float] = SECONDS):
        self._bounds = bounds
        self._counts = [0] * len(bounds)
        self.count, self.sum = 0, 0.0

    def observe(self, value: float) -> None:
        self.count, self.sum = self.count + 1, self.sum + value
        for index, bound in enumerate(self._bounds):
            self._counts[index] += value <= bound

    def lines(self, name: str) -> Iterator[str]:
        for bound, count in zip((*self._bounds, "+Inf"), (*self._counts, self.count), strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {self.count}"


class Metrics:
    """The server's numbers. Only the event loop's thread changes them."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """By endpoint and status; 499 where the client left before its answer was whole."""
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.first_token = Histogram()
        self.duration = Histogram()
        self.queue_length: Callable[[], int] = lambda: 0
        self.num_running: Callable[[], int] = lambda: 0

    def render(self) -> str:
        """The text of /metrics."""
        lines: list[str] = []

        def add(name: str, kind: str, meaning: str, samples: Iterator[str] | list[str]) -> None:
            lines.extend([f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *samples])

        by_endpoint = [
            f'moe_jax_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}'
            for (endpoint, status), count in sorted(self.requests.items())
        ]
        add("moe_jax_requests_total", "counter", "Answered requests; status 499: the client left.", by_endpoint)
        for name, kind, meaning, value in (
            ("queue_length", "gauge", "Texts that wait for a place in the batch.", self.queue_length()),
            ("running", "gauge", "Texts in the batch.", self.num_running()),
            ("prompt_tokens_total", "counter", "Tokens of accepted prompts.", self.prompt_tokens),
            ("generated_tokens_total", "counter", "Tokens generated.", self.generated_tokens),
        ):
            add(f"moe_jax_{name}", kind, meaning, [f"moe_jax_{name} {value}"])
        for name, meaning, histogram in (
            ("time_to_first_token_seconds", "From a completion's arrival to its first token.", self.first_token),
            ("request_duration_seconds", "From a completion's arrival to its end.", self.duration),
        ):
            add(f"moe_jax_{name}", "histogram", meaning, histogram.lines(f"moe_jax_{name}"))
        return "\n".join(lines) + "\n"
