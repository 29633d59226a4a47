"""What another policy would have decided, computed from the logged scores.

The audit log keeps every classifier's scores, so a new version can be tried on real traffic before
it is used. Prompts and images are not needed, and are not in the log.
"""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from calotype.moderation.decision import Measured
from calotype.moderation.documents import JsonObject
from calotype.moderation.errors import AuditError
from calotype.moderation.policy.categories import Category, Modality, Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.spec import available_lists

SHOWN = 20
"""Decisions named in each direction."""


@dataclass(frozen=True, slots=True)
class LoggedFinding:
    """What is read of a finding in a log."""

    category: str
    verdict: Verdict
    rule: str


@dataclass(frozen=True, slots=True)
class LoggedDecision:
    """What is read of a line of an audit log."""

    id: str
    verdict: Verdict
    categories: tuple[str, ...]
    peaks: tuple[Measured, ...] | None
    """None = logged without scores."""
    findings: tuple[LoggedFinding, ...]

    @classmethod
    def parse(cls, line: str) -> LoggedDecision:
        """Raises ValueError, KeyError or TypeError."""
        decision: JsonObject = json.loads(line)["decision"]
        peaks = decision.get("peaks")
        return cls(
            decision["id"],
            Verdict(decision["verdict"]),
            tuple(decision.get("categories", ())),
            None
            if peaks is None
            else tuple((Category(named), Modality(kind), score) for named, kind, score in peaks),
            tuple(
                LoggedFinding(found["category"], Verdict(found["verdict"]), found["rule"])
                for found in decision.get("findings", ())
            ),
        )


@dataclass(slots=True)
class Replay:
    """Decisions of a log under the policy they were made under, and under another one."""

    policy: str
    policy_sha256: str
    compared: int = 0
    skipped: int = 0
    """Could not be checked then, or logged without measurements."""
    before: Counter[str] = field(default_factory=Counter)
    after: Counter[str] = field(default_factory=Counter)
    newly_refused: dict[str, list[str]] = field(default_factory=dict)
    """Category -> ids of decisions that would be refused now."""
    newly_served: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        return {
            "policy": self.policy,
            "policy_sha256": self.policy_sha256,
            "checked": self.compared,
            "skipped": self.skipped,
            "before": dict(self.before),
            "after": dict(self.after),
            "newly_refused": self.newly_refused,
            "newly_served": self.newly_served,
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        shown = [
            f"{self.compared} decisions again under {self.policy}"
            + (f" ({self.skipped} have no measurements)" if self.skipped else ""),
            f"{'verdict':<8} {'then':>7} {'now':>7}",
        ]
        shown += [
            f"{verdict:<8} {self.before[verdict]:>7} {self.after[verdict]:>7}"
            for verdict in Verdict
            if self.before[verdict] or self.after[verdict]
        ]
        for title, found in (
            ("would be refused now", self.newly_refused),
            ("would be served now", self.newly_served),
        ):
            for category, ids in sorted(found.items()):
                named = ", ".join(ids[:SHOWN]) + (" ..." if len(ids) > SHOWN else "")
                shown.append(f"{title}: {len(ids)} for {category}: {named}")
        if not self.newly_refused and not self.newly_served:
            shown.append("Nobody would be answered otherwise.")
        return shown


def replay(where: pathlib.Path, policy: Policy) -> Replay:
    """Applies a policy to the decisions of an audit log, or of a folder of them.

    Raises:
        AuditError: there is no log, or a line of it cannot be read.
    """
    found = Replay(policy.identity, policy.sha256)
    for decision in _decisions(where):
        if decision.peaks is None:
            found.skipped += 1
            continue
        then = decision.verdict
        now, category = _again(decision, policy)
        found.compared += 1
        found.before[then] += 1
        found.after[now] += 1
        if then.served and not now.served:
            found.newly_refused.setdefault(category, []).append(decision.id)
        elif now.served and not then.served:
            old = ", ".join(decision.categories) or "nothing"
            found.newly_served.setdefault(old, []).append(decision.id)
    return found


def _again(decision: LoggedDecision, policy: Policy) -> tuple[Verdict, str]:
    """The most severe verdict of the policy, and the category it is for."""
    worst, why = Verdict.ALLOW, ""
    for category, modality, score in decision.peaks or ():
        effect = policy.rule(category, modality).verdict(score)
        if effect is not None and effect[0].severity > worst.severity:
            worst, why = effect[0], category
    for finding in decision.findings:
        if _still_listed(finding.rule, policy) and finding.verdict.severity > worst.severity:
            worst, why = finding.verdict, finding.category
    return worst, why


def _still_listed(rule: str, policy: Policy) -> bool:
    """Whether a list that fired then is part of the policy; its text cannot be read again."""
    kind, name, *_ = [*rule.split("."), ""]
    if kind != "lists":
        return False
    return name in policy.lists or (name not in available_lists() and bool(policy.terms))


def _decisions(where: pathlib.Path) -> Iterator[LoggedDecision]:
    logs = sorted(where.glob("*.jsonl")) if where.is_dir() else [where]
    if not logs or not logs[0].is_file():
        raise AuditError(f"{where}: there is no audit log here.")
    for log in logs:
        with log.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield LoggedDecision.parse(line)
                except (ValueError, KeyError, TypeError):
                    raise AuditError(f"{log}, line {number}: not a line of an audit log.") from None
