"""What /metrics says, in Prometheus' format: the names that vLLM's dashboards know, after ``dsvl2:`` and not ``vllm:``.

The engine counts what it does (`AsyncEngine.statistics`); the counters and times of whole requests are counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsvl2_jax.infer.serve.loop_lag import LoopLag

PREFIX = "dsvl2:"

# Keys of `AsyncEngine.statistics`, and what they are.
ENGINE_GAUGES = {
    "num_requests_running": "Answers that have a slot.",
    "num_requests_waiting": "Answers that wait for a slot.",
    "kv_cache_usage_perc": "Share of the slots' cache positions that are reserved, 0 to 1.",
}
ENGINE_COUNTERS = {
    "prefix_cache_queries": "Prompt tokens that were looked up in the prefix store.",
    "prefix_cache_hits": "Prompt tokens that were found there.",
    "mm_cache_queries": "Pictures that were looked up in the feature store.",
    "mm_cache_hits": "Pictures that were found there.",
    "tiles": "Tiles that were encoded.",
    "spec_decode_num_draft_tokens": "Tokens that were drafted with --speculate.",
    "spec_decode_num_accepted_tokens": "Drafted tokens that were right, and are in answers.",
    "compilations": "Programs that were compiled; it stands still once the server is ready.",
    "recoveries": "Times that the caches were built anew after a failure of the device.",
}
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)

# Phases of `Answer.timing`, and the metric of each.
_PHASES = {"queue": "request_queue_time_seconds", "prefill": "request_prefill_time_seconds"} | {
    "decode": "request_decode_time_seconds"
}


class Metrics:
    """The counters of one server.

    What counts answers has the name of the model that was asked, the base or an adapter; the engine's own figures and
    those of HTTP are all under the base's.
    """

    def __init__(self, models: Sequence[str], statistics: Callable[[], Mapping[str, float]], lag: LoopLag):
        """``models``: names, the base's first."""
        self.registry = CollectorRegistry()
        self.registry.register(_Statistics(models[0], statistics, lag))
        self._base = models[0]
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of the requests that were answered.")
        self._image_tokens = self._counter("prompt_image_tokens", "Those of them that stand for pictures.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self._success = self._counter("request_success", "Answers, by how they ended.", "finished_reason")
        self._requests = self._counter("http_requests", "HTTP requests, by path and status.", "path", "status")
        self._times = {
            name: self._histogram(name, text)
            for name, text in (
                ("time_to_first_token_seconds", "From the arrival of a request to the first token of its answer."),
                ("e2e_request_latency_seconds", "From the arrival of a request to the end of its answer."),
                ("request_queue_time_seconds", "Waiting for a slot."),
                ("request_prefill_time_seconds", "Encoding pictures and reading the prompt."),
                ("request_decode_time_seconds", "From the first token to the last."),
            )
        }
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Mean time of an answer's tokens after its first.", _TOKEN_SECONDS
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(PREFIX + name, text, ("model_name",), registry=self.registry, buckets=buckets)

    def request(self, path: str, status: int) -> None:
        """Counts an HTTP request. ``path`` is a route's: what clients make up would be counters without end."""
        self._requests.labels(self._base, path, str(status)).inc()

    def prompt(self, model: str, tokens: int, image_tokens: int) -> None:
        """Counts a prompt that an answer has begun to."""
        self._prompt_tokens.labels(model).inc(tokens)
        self._image_tokens.labels(model).inc(image_tokens)

    def first_token(self, model: str, seconds: float) -> None:
        """Counts the time from a request's arrival to an answer's first token."""
        self._times["time_to_first_token_seconds"].labels(model).observe(seconds)

    def answer(self, model: str, reason: str, tokens: int, seconds: float, timing: Mapping[str, float]) -> None:
        """Counts an answer that has ended.

        Args:
          model: name of the one that was asked.
          reason: "stop", "length", "abort" (the client has gone) or "error".
          tokens: of the answer.
          seconds: since the request arrived.
          timing: `Answer.timing`.
        """
        self._generation_tokens.labels(model).inc(tokens)
        self._success.labels(model, reason).inc()
        if reason not in ("stop", "length"):
            return
        self._times["e2e_request_latency_seconds"].labels(model).observe(seconds)
        for phase, name in _PHASES.items():
            if phase in timing:
                self._times[name].labels(model).observe(timing[phase])
        if "decode" in timing and tokens > 1:
            self._per_token.labels(model).observe(timing["decode"] / (tokens - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Statistics(Collector):
    """What the engine and the event loop say at the moment of asking."""

    def __init__(self, model: str, statistics: Callable[[], Mapping[str, float]], lag: LoopLag):
        self._model, self._statistics, self._lag = model, statistics, lag

    def collect(self) -> Iterator[Metric]:
        values = self._statistics()
        for names, family in ((ENGINE_GAUGES, GaugeMetricFamily), (ENGINE_COUNTERS, CounterMetricFamily)):
            for name, text in names.items():
                if name in values:
                    yield self._sample(family, name, text, values[name])
        lag = (
            ("event_loop_lag_seconds", "Longest stall of the event loop in the last 15 seconds.", self._lag.recent),
            (
                "event_loop_lag_max_seconds",
                "Longest stall since the server was ready.",
                self._lag.longest,
            ),
        )
        for name, text, value in lag:
            yield self._sample(GaugeMetricFamily, name, text, value)

    def _sample(self, family: type[Metric], name: str, text: str, value: float) -> Metric:
        metric = family(PREFIX + name, text, labels=("model_name",))
        metric.add_metric((self._model,), value)
        return metric

    def describe(self) -> Iterator[Metric]:
        return iter(())
