"""What Prometheus may ask the operator."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Metrics:
    """The operator's own numbers; a registry of their own keeps tests apart."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "calotype_operator_reconciles",
            "Reconciles by kind and outcome (ok, failed, postponed).",
            ["kind", "outcome"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "calotype_operator_reconcile_seconds",
            "Duration of one reconcile.",
            ["kind"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.depth = Gauge(
            "calotype_operator_queue_depth",
            "Keys in the work queue, also those of a later time.",
            registry=self.registry,
        )
        self.pushes = Counter(
            "calotype_operator_config_pushes",
            "Configurations written for the replicas of a model.",
            ["namespace", "model"],
            registry=self.registry,
        )
        self.objects = Gauge(
            "calotype_operator_objects",
            "Custom resources by kind and phase.",
            ["kind", "phase"],
            registry=self.registry,
        )
        self.writes = Counter(
            "calotype_operator_writes",
            "Objects written to the API server, by kind and verb.",
            ["kind", "verb"],
            registry=self.registry,
        )
        self.watch_restarts = Counter(
            "calotype_operator_watch_restarts",
            "How often watching began anew.",
            registry=self.registry,
        )
