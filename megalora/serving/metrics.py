"""Numbers of the server for Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ServerMetrics:
    """counts  (requests that run, requests that wait)"""

    def __init__(self, counts: Callable[[], tuple[int, int]]):
        self._registry = registry = CollectorRegistry()
        labels = ["model", "status"]
        self._requests = Counter("megalora_requests", "Requests by model and HTTP status", labels, registry=registry)
        self._prompt_tokens = Counter("megalora_prompt_tokens", "Tokens of prompts", ["model"], registry=registry)
        self._tokens = Counter("megalora_generated_tokens", "Tokens of replies", ["model"], registry=registry)
        self._cancelled = Counter("megalora_cancelled", "Requests whose client left", registry=registry)
        self._first = Histogram(
            "megalora_first_token_seconds", "Time to the first token of a reply", buckets=_SECONDS, registry=registry
        )
        self._whole = Histogram(
            "megalora_request_seconds", "Time to the end of the replies", buckets=_SECONDS, registry=registry
        )
        running = Gauge("megalora_running", "Requests that run", registry=registry)
        waiting = Gauge("megalora_waiting", "Requests that wait for a slot", registry=registry)
        running.set_function(lambda: counts()[0])
        waiting.set_function(lambda: counts()[1])

    def answered(self, model: str, status: int) -> None:
        """Count an answer. model: a name that is served, or "" """
        self._requests.labels(model, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def replied(self, model: str, prompt_tokens: int, tokens: int, seconds: float) -> None:
        """Count the replies to one request, which are whole."""
        self._prompt_tokens.labels(model).inc(prompt_tokens)
        self._tokens.labels(model).inc(tokens)
        self._whole.observe(seconds)

    def cancelled(self) -> None:
        self._cancelled.inc()

    def text(self) -> bytes:
        """Return all numbers in Prometheus' text format."""
        return generate_latest(self._registry)
