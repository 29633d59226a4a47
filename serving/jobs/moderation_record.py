"""The column ``moderation`` of a job: every decision about it, and what became of held images.

    {"input": decision, "output": [decision of each image], "held": [{"index", "case_id",
     "asset_id", "categories", "status"}]}

Each part appears once there is something to say. Fields that this release does not know are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from calotype.serving.core.decision import Decision
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.payloads import known_fields

HeldStatus = Literal["held", "released", "rejected"]


@dataclass(frozen=True, slots=True)
class HeldEntry:
    """A held image as the job's team is told of it."""

    index: int
    case_id: str
    asset_id: str
    categories: tuple[str, ...]
    status: HeldStatus = "held"

    def to_payload(self) -> JsonObject:
        return asdict(self) | {"categories": list(self.categories)}

    @classmethod
    def from_payload(cls, payload: JsonObject) -> HeldEntry:
        known = known_fields(cls, payload)
        return cls(**known | {"categories": tuple(known.get("categories", ()))})


@dataclass(frozen=True, slots=True)
class ModerationRecord:
    input: Decision | None = None
    """About the prompt."""
    output: tuple[Decision, ...] = ()
    """About every drawn image, in order."""
    held: tuple[HeldEntry, ...] = ()
    other: JsonObject = field(default_factory=dict)

    def with_status(self, asset_id: str, status: HeldStatus) -> ModerationRecord:
        """With the new state of one held image."""
        held = [replace(e, status=status) if e.asset_id == asset_id else e for e in self.held]
        return replace(self, held=tuple(held))

    def to_payload(self) -> JsonObject:
        payload = dict(self.other)
        if self.input is not None:
            payload["input"] = self.input.to_payload()
        if self.output:
            payload["output"] = [decision.to_payload() for decision in self.output]
        if self.held:
            payload["held"] = [entry.to_payload() for entry in self.held]
        return payload

    @classmethod
    def from_payload(cls, payload: Mapping[str, object] | None) -> ModerationRecord:
        """Of the column; an empty record where it is null."""
        other = dict(payload or {})
        decision, output, held = (other.pop(name, None) for name in ("input", "output", "held"))
        return cls(
            Decision.from_payload(decision) if decision else None,
            tuple(map(Decision.from_payload, output)) if isinstance(output, list) else (),
            tuple(map(HeldEntry.from_payload, held)) if isinstance(held, list) else (),
            other,
        )
