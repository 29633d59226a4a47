"""What the safety stage decided about a prompt or an image, as serving carries and stores it.

`moderation.decision.Decision` is the safety stage's own; this is what leaves its process. Fields
that this release does not know are kept, so that a job's row shows all that was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TypeGuard

from calotype.serving.core.json_object import JsonObject

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


@dataclass(frozen=True, slots=True)
class CheckScope:
    """For whom a prompt or an image is checked; JSON in the ``input`` of a job."""

    policies: tuple[str, ...] = ()
    """Names of the policies that apply beside the model's, the most specific one first."""
    requested_level: str | None = None
    """What the caller asked for: ``low``, or ``0`` to ``6``; None = nothing."""

    def to_payload(self) -> JsonObject:
        return {"policies": list(self.policies), "wish": self.requested_level}

    @classmethod
    def from_payload(cls, payload: object) -> CheckScope | None:
        """None where there is no scope; other fields are ignored."""
        if not _is_object(payload):
            return None
        level = payload.get("wish")
        return cls(_strings(payload.get("policies")), None if level is None else str(level))


@dataclass(frozen=True, slots=True)
class ImageContext:
    """What an image is checked with besides its pixels. Nothing of it is optional: rules combine
    what an image shows with what it was drawn for and from."""

    prompt: str
    """What it was drawn for; empty for an image that somebody brings."""
    references: Sequence[Pixels]
    """The images that it was drawn from; none for an image that somebody brings."""
    scope: CheckScope | None
    """For whom it is checked; None = under the model's policy alone."""

    @classmethod
    def of_upload(cls, scope: CheckScope | None) -> ImageContext:
        """Of an image that was not drawn here."""
        return cls("", (), scope)


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """What a decision was made by; decisions of one job are comparable where it is equal."""

    sha256: str | None
    """Of the policy."""
    preset: str | None
    """The preset that the caller got."""


NEWEST_TAKEDOWN = "newest_takedown"
"""Number of the newest takedown that a decision about an image knew: a field of its payload."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The default is the one that lets nothing pass: no decision could be made."""

    verdict: str = "ERROR"
    """``ALLOW``, ``FLAG``, ``BLUR``, ``BLOCK``, ``REVIEW`` or ``ERROR``."""
    blocked: bool = True
    """Whether what was checked must not be shown as it is."""
    flagged: bool = True
    unavailable: bool = True
    id: str | None = None
    stage: str | None = None
    """``input`` (a prompt) or ``output`` (an image)."""
    policy: str | None = None
    policy_sha256: str | None = None
    preset: str | None = None
    categories: tuple[str, ...] = ()
    """The categories for which it is not shown."""
    reason: str | None = None
    """Why no decision could be made: a sentence."""
    message: str | None = None
    """What the policy says to the person whose prompt or image is refused."""
    details: JsonObject = field(default_factory=dict)
    """Everything else that the safety stage wrote: scores, findings, times."""

    @property
    def undecided(self) -> bool:
        """Whether nothing could be decided; it is refused, and may be tried again."""
        return self.unavailable or self.verdict == "ERROR"

    @property
    def newest_takedown(self) -> int | None:
        """Of what is refused as taken down this is the newest it knew; None = it was not told."""
        found = self.details.get(NEWEST_TAKEDOWN)
        return found if isinstance(found, int) else None

    @property
    def timed_out(self) -> bool:
        """Whether a classifier hung over it: it may be the content that it hangs over."""
        return self.undecided and bool(self.details.get("timed_out"))

    @property
    def version(self) -> PolicyVersion:
        return PolicyVersion(self.policy_sha256, self.preset)

    @property
    def review_categories(self) -> tuple[str, ...] | None:
        """The categories for which a reviewer must look first; None = no reviewer is needed."""
        return None if self.verdict != "REVIEW" or self.undecided else self.categories

    def to_payload(self) -> JsonObject:
        known = {name: getattr(self, name) for name in _KNOWN}
        return {**self.details, **known, "categories": list(self.categories)}

    @classmethod
    def from_payload(cls, payload: object) -> Decision:
        """What `to_payload` or the safety stage wrote; what is no decision lets nothing pass."""
        if not _is_object(payload) or "blocked" not in payload:
            return cls()
        known: JsonObject = {name: value for name, value in payload.items() if name in _KNOWN}
        known |= {name: bool(payload.get(name, False)) for name in _FLAGS}
        known["categories"] = _strings(payload.get("categories"))
        known.setdefault("verdict", "BLOCK" if known["blocked"] else "ALLOW")
        details = {name: value for name, value in payload.items() if name not in _KNOWN}
        return cls(**known, details=details)


_KNOWN = tuple(found.name for found in fields(Decision) if found.name != "details")
_FLAGS = ("blocked", "flagged", "unavailable")


def _is_object(payload: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(payload, Mapping)


def _strings(given: object) -> tuple[str, ...]:
    return tuple(map(str, given)) if isinstance(given, Sequence) else ()
