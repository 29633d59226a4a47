"""The result of the safety stage: the verdict, the rules that fired, and the policy."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from calotype.moderation.documents import JsonObject
from calotype.moderation.policy.categories import Category, Modality, Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.rulebook import Applying
from calotype.moderation.policy.rules import Privacy

Stage = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule that fired."""

    category: Category
    verdict: Verdict
    score: float
    threshold: float
    rule: str
    """Where the rule stands: ``sexual.text.block``, or ``lists.minors.minor-near-sexual``."""
    classifier: str
    where: str
    """The view of the prompt (``raw``, ``base64``, ...) or part of the image that fired."""

    def to_payload(self) -> JsonObject:
        return {
            "category": self.category.value,
            "verdict": self.verdict.value,
            "score": round(self.score, 4),
            "threshold": self.threshold,
            "rule": self.rule,
            "classifier": self.classifier,
            "where": self.where,
        }


Measured = tuple[Category, Modality, float]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What the lists and classifiers found in one prompt or image."""

    findings: Sequence[Finding]
    scores: Mapping[Category, float]
    """Per category the highest of all modalities; 1 where a list refused."""
    peaks: tuple[Measured, ...] = ()
    """Per category and modality the highest that a classifier measured."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The result for one prompt (stage input) or image (stage output)."""

    id: str
    stage: Stage
    policy: str
    policy_sha256: str
    verdict: Verdict
    findings: tuple[Finding, ...] = ()
    scores: Mapping[Category, float] = field(default_factory=dict)
    peaks: tuple[Measured, ...] = ()
    unavailable: bool = False
    timed_out: bool = False
    """A classifier hung over it, so it should not be given to one after the other."""
    reason: str | None = None
    """Why nothing could be checked: a sentence that names the classifier."""
    message: str | None = None
    """What the policy says to the person whose prompt or image is refused."""
    asked: str | None = None
    """The level that the caller asked for: ``low``, or ``0`` to ``6``."""
    preset: str | None = None
    """The preset that was applied; ``auto`` is the policy itself."""
    granted: bool = True
    """Whether it is what the caller asked for."""
    privacy: Privacy = field(default_factory=Privacy)
    """What may be kept of what was checked; no part of the JSON form."""
    milliseconds: float = 0.0

    @property
    def served(self) -> bool:
        """Whether what was checked may be shown; REVIEW and BLUR are held, ERROR is refused."""
        return self.verdict.served

    @property
    def blocked(self) -> bool:
        return not self.served

    @property
    def flagged(self) -> bool:
        return self.verdict is not Verdict.ALLOW

    @property
    def categories(self) -> tuple[Category, ...]:
        """The categories for which it is not served, in the order of `Category`."""
        found = {finding.category for finding in self.findings if not finding.verdict.served}
        return tuple(category for category in Category if category in found)

    @property
    def flagged_categories(self) -> tuple[Category, ...]:
        """The categories of every finding, the flagging ones too."""
        found = {finding.category for finding in self.findings}
        return tuple(category for category in Category if category in found)

    def to_payload(self) -> JsonObject:
        """The JSON form: what serving, the audit and ``calotype moderate`` read."""
        return {
            "id": self.id,
            "stage": self.stage,
            "policy": self.policy,
            "policy_sha256": self.policy_sha256,
            "verdict": self.verdict.value,
            "served": self.served,
            "blocked": self.blocked,
            "flagged": self.flagged,
            "unavailable": self.unavailable,
            **({"timed_out": True} if self.timed_out else {}),
            "reason": self.reason,
            "message": self.message,
            "asked": self.asked,
            "preset": self.preset,
            "granted": self.granted,
            "categories": [category.value for category in self.categories],
            "flagged_categories": [category.value for category in self.flagged_categories],
            "scores": {category.value: round(score, 4) for category, score in self.scores.items()},
            "peaks": [
                [category.value, modality.value, round(score, 4)]
                for category, modality, score in self.peaks
            ],
            "findings": [finding.to_payload() for finding in self.findings],
            "milliseconds": round(self.milliseconds, 2),
        }


def new_decision_id() -> str:
    return f"dec_{secrets.token_hex(12)}"


def decide(
    applying: Applying,
    stage: Stage,
    result: CheckResult,
    milliseconds: float,
    asked: str | None = None,
) -> Decision:
    """The most severe finding wins; no finding means ALLOW."""
    policy = applying.policy
    ranked = sorted(
        result.findings, key=lambda finding: (-finding.verdict.severity, -finding.score)
    )
    verdict = ranked[0].verdict if ranked else Verdict.ALLOW
    message = None
    if not verdict.served:
        message = policy.messages.get(ranked[0].category)
    return Decision(
        id=new_decision_id(),
        stage=stage,
        policy=policy.identity,
        policy_sha256=policy.sha256,
        verdict=verdict,
        findings=tuple(ranked),
        scores=dict(result.scores),
        peaks=result.peaks,
        message=message,
        asked=asked,
        preset=applying.preset,
        granted=applying.granted,
        privacy=policy.privacy,
        milliseconds=milliseconds,
    )


def failed(
    policy: Policy, stage: Stage, reason: str, milliseconds: float, *, timed_out: bool = False
) -> Decision:
    """The decision where a classifier failed: refused, or held where the policy says so."""
    return Decision(
        id=new_decision_id(),
        stage=stage,
        policy=policy.identity,
        policy_sha256=policy.sha256,
        verdict=Verdict.ERROR if policy.on_error == "block" else Verdict.REVIEW,
        unavailable=True,
        timed_out=timed_out,
        reason=reason,
        privacy=policy.privacy,
        milliseconds=milliseconds,
    )
