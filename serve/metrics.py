"""Counters of one API process, in Prometheus' text format."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

GAUGES = {
    "running": "Answers being generated",
    "waiting": "Requests waiting for a place",
    "kv_tokens_used": "Tokens of keys and values in use, padding included",
    "kv_tokens": "Tokens of keys and values there is room for",
    "tokens_per_second": "Generated over the last seconds",
    "memory_bytes": "Memory of the engine's device, or of its process on a CPU",
    "replicas": "Copies of the model",
}


class Metrics:
    """Every API process counts for itself."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self._registry, "namespace": "bruno"}
        self._requests = Counter("http_requests", "Requests by route and status", ["route", "status"], **common)
        self._prompt = Counter("prompt_tokens", "Prompt tokens read", ["model"], **common)
        self._completion = Counter("completion_tokens", "Tokens generated", ["model"], **common)
        self._first = Histogram("time_to_first_token_seconds", "Streams", ["model"], buckets=FIRST_TOKEN, **common)
        self._between = Histogram(
            "inter_token_seconds", "Streams: time between messages over their tokens", ["model"],
            buckets=BETWEEN_TOKENS, **common,
        )  # fmt: skip
        self._whole = Histogram("answer_seconds", "Whole answers", ["model"], buckets=WHOLE, **common)
        self.resends = Counter("resent_requests", "Requests sent again because a replica died", **common)
        self.in_flight = Gauge("requests_in_flight", "Generating requests in this process", **common)
        self._engines = {name: Gauge(f"engine_{name}", text, ["engine"], **common) for name, text in GAUGES.items()}

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def first_token(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def next_tokens(self, model: str, seconds: float, n: int) -> None:
        """``n`` tokens came ``seconds`` after the ones before."""
        histogram = self._between.labels(model)
        for _ in range(n):
            histogram.observe(seconds / n)

    def answer(self, model: str, n_prompt: int, n_completion: int, seconds: float) -> None:
        self._prompt.labels(model).inc(n_prompt)
        self._completion.labels(model).inc(n_completion)
        self._whole.labels(model).observe(seconds)

    def text(self, engines: Mapping[str, Mapping[str, Any]]) -> bytes:
        """Everything, with the engines' figures of this moment."""
        for key, stats in engines.items():
            for name, gauge in self._engines.items():
                gauge.labels(key).set(stats[name])
        return generate_latest(self._registry)
