"""Trainings as values: rows of the job database, what they told, and what they leave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from calotype.serving.core.json_object import JsonObject

TrainingStatus = Literal["queued", "running", "suspended", "succeeded", "failed", "canceled"]
Wanted = Literal["run", "suspend", "cancel"]
Order = Literal["run", "suspend", "cancel", "stop"]
"""What a worker is to do; stop = the budget is spent."""
OPEN: tuple[TrainingStatus, ...] = ("queued", "running", "suspended")


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """A row of the table ``trainings``."""

    id: str
    team_id: str
    api_key_id: str
    model: str
    name: str
    """Of the adapter to be made."""
    dataset_id: str
    settings: JsonObject
    created: float
    status: TrainingStatus = "queued"
    wanted: Wanted = "run"
    progress: JsonObject = field(default_factory=dict)
    checkpoints: list[JsonObject] = field(default_factory=list)
    samples: list[JsonObject] = field(default_factory=list)
    acceptance: JsonObject | None = None
    promoted: float | None = None
    adapter_file_id: str | None = None
    report_file_id: str | None = None
    adapter_sha256: str | None = None
    error: JsonObject | None = None
    device_seconds: float = 0.0
    price: float = 0.0
    budget_seconds: float | None = None
    fence: int = 0
    leased_until: float | None = None
    started: float | None = None
    ended: float | None = None

    @property
    def over(self) -> bool:
        return self.status not in OPEN

    @property
    def cost(self) -> float:
        return self.device_seconds * self.price


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """A row of the table ``training_events``."""

    number: int
    type: str
    data: JsonObject
    created: float


@dataclass(frozen=True, slots=True)
class Result:
    """What a training that succeeded leaves."""

    adapter_file_id: str
    adapter_sha256: str
    acceptance: JsonObject | None
    """The report of its acceptance set; None = none was asked for."""
    report_file_id: str | None = None
    """The same with pictures, as HTML."""
