"""What the operator knows of a running model: the last answer of its app, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from calotype.serving.config import describe
from calotype.serving.wire.model_status import ModelAppStatus, ReplicaState

AdapterView = tuple[tuple[str, bool, str, str | None], ...]
"""Replica, whether it draws, state and wanted revision of one adapter, for every replica."""


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One answer of a model app, or why there is none."""

    status: ModelAppStatus | None
    problem: str = ""
    """Why there is no status."""

    @property
    def reachable(self) -> bool:
        return self.status is not None

    @property
    def ready(self) -> bool:
        return self.status is not None and self.status.ready

    @property
    def replicas(self) -> int:
        """How many there are, starting ones included."""
        return 0 if self.status is None else self.status.replicas or len(self.states)

    @property
    def states(self) -> Sequence[ReplicaState]:
        return () if self.status is None else self.status.replica_states

    @property
    def ready_replicas(self) -> int:
        return sum(state.ready for state in self.states)

    @property
    def queue_seconds(self) -> float:
        return 0.0 if self.status is None else self.status.queue_seconds

    @property
    def config_hash(self) -> str:
        return "" if self.status is None else self.status.config_hash

    @property
    def message(self) -> str:
        """What is wrong: with the app, or with the first replica that complains."""
        return self.problem or next((s.message for s in self.states if s.message), "")

    def adapter_views(self) -> dict[str, AdapterView]:
        """Adapter -> what all replicas say of it, for comparing two reports."""
        found: dict[str, list[tuple[str, bool, str, str | None]]] = {}
        for replica in self.states:
            for name, adapter in replica.adapters.items():
                view = (replica.replica, replica.ready, adapter.state, adapter.revision)
                found.setdefault(name, []).append(view)
        return {name: tuple(sorted(views, key=str)) for name, views in found.items()}

    def replica_set(self) -> frozenset[tuple[str, bool]]:
        """The replicas, and whether each draws."""
        return frozenset((state.replica, state.ready) for state in self.states)

    def knows(self, adapter: str) -> bool:
        """Whether a replica still knows an adapter."""
        return any(adapter in state.adapters for state in self.states)

    def loaded_everywhere(self, names: frozenset[str]) -> int:
        """How many of these adapters every replica that draws has loaded."""
        drawing = [state.adapters for state in self.states if state.ready]
        if not drawing:
            return 0
        return sum(
            all(name in adapters and adapters[name].state == "ready" for adapters in drawing)
            for name in names
        )


def unreachable(problem: str) -> ModelReport:
    """A report without a status; one sentence says why."""
    return ModelReport(None, problem)


def read_report(body: bytes) -> ModelReport:
    """The report of an answer's JSON."""
    try:
        return ModelReport(ModelAppStatus.model_validate_json(body))
    except ValidationError as error:
        return unreachable(f"The model app's status cannot be read: {describe(error)}")


def queue_field(report: ModelReport | None, before: float | None) -> float | None:
    """``status.queueSeconds``; small changes are no reason to write a status."""
    if report is None or not report.reachable:
        return None
    now = round(report.queue_seconds)
    if (
        before is not None
        and abs(now - before) <= max(2.0, 0.2 * before)
        and (now > 0) == (before > 0)
    ):
        return before
    return float(now)
