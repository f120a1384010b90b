"""What Prometheus reads from one replica. Times per token are the engine's, without a client's slow line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from actors.requests import Completion
from actors.worker import WorkerLoad, WorkerStats

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts of requests and answers; `load` and `stats` are asked at each scrape."""

    def __init__(self, load: Callable[[], WorkerLoad], stats: Callable[[], WorkerStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(load, stats))
        self.requests = self._counter("requests", "Responses, by route and status", "route", "status")
        self.disconnects = self._counter("disconnects", "Requests whose client left before the end")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests")
        self._cached_tokens = self._counter("cached_tokens", "Those of them that the prefix cache had")
        self._completion_tokens = self._counter("completion_tokens", "Tokens written")
        self._row_errors = self._counter("row_errors", "Prompts that the engine could not answer", "kind")
        self.request_s = self._histogram("request_seconds", "From the request to the end of its answer", _WHOLE_S)
        self._first_token_s = self._histogram(
            "time_to_first_token_seconds", "In the engine, waiting included", _FIRST_TOKEN_S
        )
        self._inter_token_s = self._histogram(
            "inter_token_seconds", "Mean of a prompt's tokens after the first", _BETWEEN_TOKENS_S
        )

    def note(self, completion: Completion, *, is_online: bool = True) -> None:
        """Count what one prompt took; a batch's has no part in how long clients wait."""
        usage = completion.usage
        if completion.error is not None:
            self._row_errors.labels(completion.error.kind).inc()
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._cached_tokens.inc(usage.cached_tokens)
        self._completion_tokens.inc(usage.completion_tokens)
        if not is_online:
            return
        if usage.time_to_first_token_s is not None:
            self._first_token_s.observe(usage.time_to_first_token_s)
        if usage.inter_token_s is not None:
            self._inter_token_s.observe(usage.inter_token_s)

    def text(self) -> bytes:
        """The whole page, in Prometheus' text format."""
        return generate_latest(self._registry)

    def samples(self) -> Iterator[tuple[str, Mapping[str, str], float]]:
        """All that stands on the page: name, labels and value."""
        for family in self._registry.collect():
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    yield sample.name, sample.labels, sample.value

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"shoal_{name}", about, labels, registry=self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"shoal_{name}", about, buckets=buckets, registry=self._registry)


class _EngineCollector(Collector):
    def __init__(self, load: Callable[[], WorkerLoad], stats: Callable[[], WorkerStats]) -> None:
        self._load = load
        self._stats = stats

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        load, stats = self._load(), self._stats()
        for name, about, value in (
            ("sequences_running", "Completions in the engine's batch", load.num_running),
            ("sequences_waiting", "Completions that wait for a place in it", load.num_waiting),
            ("pages_in_use", "KV pages that running completions hold", load.num_pages_in_use),
            ("pages", "KV pages there are", load.num_pages),
        ):
            yield GaugeMetricFamily(f"shoal_{name}", about, value)
        for name, about, number in (
            ("engine_busy_seconds", "Time in engine steps", stats.busy_s),
            ("engine_idle_seconds", "Time without work", stats.idle_s),
            ("preemptions", "Completions that gave their pages back to be computed again", stats.num_preemptions),
        ):
            yield CounterMetricFamily(f"shoal_{name}", about, number)
        drafted = CounterMetricFamily("shoal_drafted_tokens", "Tokens guessed", labels=["drafter"])
        accepted = CounterMetricFamily("shoal_accepted_tokens", "Guesses that were right", labels=["drafter"])
        for drafter in stats.drafters:
            drafted.add_metric([drafter.name], drafter.drafted_tokens)
            accepted.add_metric([drafter.name], drafter.accepted_tokens)
        yield from (drafted, accepted)
