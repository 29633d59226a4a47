"""Checks a prompt: every view against the term lists, every window of it by the classifiers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calotype.moderation.classifiers import Guard
from calotype.moderation.decision import CheckResult, Finding, Measured
from calotype.moderation.errors import ClassifierUnavailable
from calotype.moderation.policy.categories import Category, Modality, Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.rules import JudgeRules
from calotype.moderation.text.matching import TermMatcher
from calotype.moderation.text.views import READ_LIMIT, Lexicon, View, views, windows

STRANGE_SHARE = 0.6
STRANGE_WORDS = 6
"""A piece of so many words of which so few are English reads like no language, or another one."""
BATCH = 8
"""Texts scored at once; between batches the deadline is looked at."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The highest score of a category, and where it was reached."""

    score: float
    classifier: str
    where: str
    modality: Modality


class Peaks:
    """Maxima per category over everything that was scored."""

    def __init__(self) -> None:
        self._peaks: dict[tuple[Category, Modality], Peak] = {}

    def add(
        self, scores: Mapping[Category, float], classifier: str, where: str, modality: Modality
    ) -> None:
        for category, score in scores.items():
            best = self._peaks.get((category, modality))
            if best is None or score > best.score:
                self._peaks[category, modality] = Peak(score, classifier, where, modality)

    def peak(self, category: Category, modality: Modality) -> Peak | None:
        return self._peaks.get((category, modality))

    def measured(self) -> tuple[Measured, ...]:
        """Every maximum, for the record: another policy can be tried on them."""
        return tuple(
            (category, modality, peak.score) for (category, modality), peak in self._peaks.items()
        )

    def scores(self) -> dict[Category, float]:
        """Per category, in the order of `Category`, the highest of all modalities."""
        found: dict[Category, float] = {}
        for category in Category:
            peaks = [peak.score for (owner, _), peak in self._peaks.items() if owner is category]
            if peaks:
                found[category] = max(peaks)
        return found

    def findings(self, policy: Policy) -> list[Finding]:
        """What the policy's thresholds make of the maxima."""
        found = []
        for (category, modality), peak in self._peaks.items():
            effect = policy.rule(category, modality).verdict(peak.score)
            if effect is not None:
                verdict, threshold = effect
                rule = f"{category}.{modality}.{verdict.lower()}"
                found.append(
                    Finding(
                        category, verdict, peak.score, threshold, rule, peak.classifier, peak.where
                    )
                )
        return found


class PromptRules:
    """What a policy says about prompts, compiled once per version."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.matcher = TermMatcher.of(policy)
        self.lexicon = Lexicon(self.matcher.vocabulary)

    def check(
        self,
        text: str,
        classifiers: Sequence[Guard[str]],
        deadline: float,
        judges: Sequence[Guard[str]] = (),
    ) -> CheckResult:
        """Checks every view of a text.

        Args:
            judges: those of the policy, in its order.

        Raises:
            ClassifierUnavailable: then nothing is known.
        """
        if len(text) > READ_LIMIT:
            raise ClassifierUnavailable(
                f"The prompt has {len(text)} characters; no more than {READ_LIMIT} can be checked."
            )
        readings = views(text, self.lexicon)
        peaks = Peaks()
        listed = self._listed(readings)
        origin = {piece: view.name for view in reversed(readings) for piece in windows(view.text)}
        pieces = list(reversed(origin))
        for guard in classifiers:
            for start in range(0, len(pieces), BATCH):
                batch = pieces[start : start + BATCH]
                for piece, scores in zip(
                    batch, guard.score(batch, deadline - time.monotonic()), strict=True
                ):
                    peaks.add(scores, guard.name, origin[piece], Modality.TEXT)
        listed += self._minors(readings, peaks)
        for rules, judge in zip(self.policy.judges, judges, strict=True):
            if self._is_asked(rules, readings, peaks):
                (scores,) = judge.score([readings[0].text], deadline - time.monotonic())
                peaks.add(scores, judge.name, "whole", Modality.JUDGE)
        scores_by_category = peaks.scores()
        for finding in listed:
            if not finding.verdict.served:
                scores_by_category[finding.category] = max(
                    finding.score, scores_by_category.get(finding.category, 0.0)
                )
        return CheckResult(
            listed + peaks.findings(self.policy), scores_by_category, peaks.measured()
        )

    def _is_asked(self, rules: JudgeRules, readings: Sequence[View], peaks: Peaks) -> bool:
        """Whether a judge of the policy shall read the prompt as well.

        Adversarial suffixes read like no language (MMA-Diffusion: 99 % at 1 % of benign prompts,
        but also a fifth of prompts with artists' names): a reason to ask, none to refuse.
        """
        if rules.when == "always":
            return True
        if any(score >= rules.above for _, _, score in peaks.measured()):
            return True
        return any(
            self.lexicon.share(piece) < STRANGE_SHARE
            for piece in windows(readings[0].text)
            if len(piece.split()) >= STRANGE_WORDS
        )

    def names_minor(self, text: str) -> bool:
        """Whether any view of a text names somebody under age."""
        return any(
            self.matcher.names_minor(view.text) for view in views(text[:READ_LIMIT], self.lexicon)
        )

    def asks_to_undress(self, text: str) -> bool:
        """Whether any view of a text asks for somebody's body."""
        readings = views(text[:READ_LIMIT], self.lexicon)
        return any(self.matcher.asks_to_undress(view.text) for view in readings)

    def _minors(self, readings: Sequence[View], peaks: Peaks) -> list[Finding]:
        """A minor in a prompt that a classifier finds even slightly sexual, whatever its words."""
        rule = self.policy.rule(Category.SEXUAL, Modality.TEXT)
        thresholds = [limit for limit in (rule.flag, rule.review, rule.block) if limit is not None]
        peak = peaks.peak(Category.SEXUAL, Modality.TEXT)
        if peak is None or not thresholds or peak.score < min(thresholds):
            return []
        for view in readings:
            if self.matcher.names_minor(view.text):
                return [
                    Finding(
                        Category.SEXUAL_MINORS,
                        Verdict.BLOCK,
                        peak.score,
                        min(thresholds),
                        "lists.minors.minor-and-sexual-score",
                        peak.classifier,
                        view.name,
                    )
                ]
        return []

    def _listed(self, readings: Sequence[View]) -> list[Finding]:
        findings: dict[str, Finding] = {}
        for view in readings:
            for match in self.matcher.matches(view.text):
                if match.rule in findings:
                    continue
                verdict = Verdict[match.action.upper()]
                findings[match.rule] = Finding(
                    match.category, verdict, 1.0, 1.0, match.rule, "lists", view.name
                )
        return list(findings.values())
