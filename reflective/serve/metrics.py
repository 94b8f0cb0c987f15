"""What Prometheus reads at ``/metrics``."""

import math
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..model import Candidate
from .engine import Engine

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_ENGINE = {
    "queued": (
        GaugeMetricFamily,
        "reflective_queued_requests",
        "Requests that wait, to be tokenized or for the model.",
    ),
    "running": (GaugeMetricFamily, "reflective_running_requests", "Requests that decode, or are being scored."),
    "rows": (GaugeMetricFamily, "reflective_rows", "Candidates in the batch that decodes."),
    "tokens": (CounterMetricFamily, "reflective_tokens", "Tokens decoded."),
    "scored": (CounterMetricFamily, "reflective_scored_texts", "Finished texts scored."),
}


class Metrics:
    """Attributes: ``registry``, of this server alone; ``requests`` by route and status; ``seconds`` by route, from the request's
    head to the end of its answer; ``scores`` of trajectories, generated or finished text."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "reflective_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "reflective_request_seconds", "Seconds to the end of the answer.", ["route"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.scores = Histogram(
            "reflective_trajectory_score",
            "Trajectory scores.",
            buckets=[i / 10 for i in range(11)],
            registry=self.registry,
        )
        self.registry.register(_EngineCollector(engine))

    def scored(self, candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            if not math.isnan(candidate.score):
                self.scores.observe(candidate.score)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        for key, (family, name, text) in _ENGINE.items():
            yield family(name, text, value=stats[key])
