"""Why an object is not served: a word for programs, and a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass

from calotype.operator.api.conditions import Reason


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the condition Accepted says when it does not hold."""

    reason: Reason | str
    message: str
