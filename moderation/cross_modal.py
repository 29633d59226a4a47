"""Rules that combine what an image shows with what it was requested with.

Each half is harmless or merely suspicious alone: the prompt names a child, a given image shows a
face, the drawn one is somewhat sexual. Together they are refused, whatever the thresholds for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from calotype.moderation.decision import Finding
from calotype.moderation.policy.categories import Category, Modality, Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.text.prompts import Peak, Peaks

LEAST = 0.35
"""Sexual score from which a rule applies; the policy's lowest threshold where that is lower."""


@dataclass(frozen=True, slots=True)
class Context:
    """What an image was requested with."""

    names_minor: bool = False
    """The prompt names somebody under age."""
    shows_face: bool = False
    """A given image shows a face."""
    asks_to_undress: bool = False
    """The prompt is about somebody's body: `matching.TermMatcher.asks_to_undress`."""

    def findings(self, peaks: Peaks, policy: Policy) -> list[Finding]:
        """What is refused for the combination."""
        found = []
        if self.shows_face and self.asks_to_undress:
            # Whatever the image shows: faces are detected, not recognised.
            category = Category.REAL_PERSON_INTIMATE
            rule = "cross-modal.face-and-undressing"
            found.append(Finding(category, Verdict.BLOCK, 1.0, 1.0, rule, "lists", "prompt"))
        for there, category, rule in (
            (self.names_minor, Category.SEXUAL_MINORS, "cross-modal.minor-and-sexual"),
            (self.shows_face, Category.REAL_PERSON_INTIMATE, "cross-modal.face-and-sexual"),
        ):
            if not there:
                continue
            for modality in (Modality.IMAGE, Modality.TILE):
                peak = peaks.peak(Category.SEXUAL, modality)
                limit = _limit(policy, modality)
                if peak is not None and peak.score >= limit:
                    found.append(_finding(category, peak, limit, rule))
                    break
        return found


def _limit(policy: Policy, modality: Modality) -> float:
    rule = policy.rule(Category.SEXUAL, modality)
    limits = [
        limit for limit in (rule.flag, rule.blur, rule.review, rule.block) if limit is not None
    ]
    if modality is Modality.TILE:
        # A tile shows less and is mistaken more often: skin beside a face, a shoulder.
        return min(limits, default=2 * LEAST)
    return min([LEAST, *limits])


def _finding(category: Category, peak: Peak, limit: float, rule: str) -> Finding:
    return Finding(category, Verdict.BLOCK, peak.score, limit, rule, peak.classifier, peak.where)
