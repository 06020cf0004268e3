"""Metrics for Prometheus under vLLM's names, so that dashboards made for it work."""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jax_it.generation import RequestOutput
from jax_it.serving.worker import Ticket, Workers

SHORT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
LONG = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)


class Metrics:
    """What a server counts; workers are asked for the present values of gauges."""

    def __init__(self, workers: Workers):
        self.registry = CollectorRegistry()
        self.registry.register(_OfWorkers(workers))

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"vllm:{name}", help, ("model_name", *labels), registry=self.registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", help, ("model_name",), registry=self.registry, buckets=buckets)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were prefilled.")
        self.generation_tokens = counter("generation_tokens", "Tokens that were generated.")
        self.success = counter("request_success", "Texts that have ended.", "finished_reason")
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", SHORT)
        self.inter_token = histogram("inter_token_latency_seconds", "From one token to the next.", SHORT)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end of a request.", LONG)
        self.queued = histogram("request_queue_time_seconds", "From arrival to the prefill.", LONG)
        self.prefill = histogram("request_prefill_time_seconds", "From the prefill to the first token.", LONG)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.", LONG)

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry)


class RequestTimes:
    """Measure one request: called with each output."""

    def __init__(self, metrics: Metrics, ticket: Ticket):
        self._metrics, self._ticket = metrics, ticket
        self._first: float | None = None
        self._last: dict[tuple[int, int], tuple[float, int]] = {}  # of each text: when its last output came, its tokens
        metrics.prompt_tokens.labels(ticket.model).inc(sum(len(prompt.tokens) for prompt in ticket.prompts))

    def record(self, output: RequestOutput) -> None:
        metrics, model, now = self._metrics, self._ticket.model, time.monotonic()
        number = len(output.tokens)
        if self._first is None:
            self._first = now
            metrics.first_token.labels(model).observe(now - self._ticket.arrived)
            started = self._ticket.started or self._ticket.arrived
            metrics.queued.labels(model).observe(started - self._ticket.arrived)
            metrics.prefill.labels(model).observe(now - started)
        text = output.request_id, output.sample
        before, tokens = self._last.get(text, (None, 0))
        if number > tokens:
            metrics.generation_tokens.labels(model).inc(number - tokens)
            if before is not None:
                metrics.inter_token.labels(model).observe((now - before) / (number - tokens))
        self._last[text] = now, number
        if output.finish_reason:
            metrics.success.labels(model, output.finish_reason).inc()

    def end(self) -> None:
        now, model = time.monotonic(), self._ticket.model
        self._metrics.whole.labels(model).observe(now - self._ticket.arrived)
        if self._first is not None:
            self._metrics.decode.labels(model).observe(now - self._first)


class _OfWorkers(Collector):
    def __init__(self, workers: Workers):
        self._workers = workers

    def collect(self) -> list[Metric]:
        """Return the present values."""
        families: list[Metric] = []
        for name, values in self._workers.gauges().items():
            gauge = GaugeMetricFamily(f"vllm:{name}", name.replace("_", " "), labels=["model_name"])
            for model, value in values.items():
                gauge.add_metric([model], value)
            families.append(gauge)
        return families
