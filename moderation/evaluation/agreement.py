"""Agreement of shadow classifiers with the decisions, from the log of `shadow.Shadows`."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields

from calotype.moderation.documents import JsonObject
from calotype.moderation.errors import AuditError
from calotype.moderation.policy.categories import Verdict

SHOWN = 10
"""Decisions named in each direction."""


@dataclass(frozen=True, slots=True)
class ShadowResult:
    """A line of the log: what one shadow classifier made of one decision."""

    time: float
    decision: str
    stage: str
    policy: str
    verdict: str
    """Of the decision."""
    classifier: str
    scores: Mapping[str, float] | None = None
    would: str | None = None
    """The verdict by the shadow's scores; None = it failed."""
    error: str | None = None

    def line(self) -> str:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(given, sort_keys=True) + "\n"

    @classmethod
    def parse(cls, line: str) -> ShadowResult:
        """Fields of newer versions are left out. Raises ValueError or TypeError."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in json.loads(line).items() if name in known})


@dataclass(slots=True)
class Agreement:
    """One classifier on trial at one stage, against the decisions."""

    classifier: str
    stage: str
    asked: int = 0
    failed: int = 0
    table: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    """(served, would be served) -> decisions."""
    would_refuse: list[str] = field(default_factory=list)
    """Ids of decisions that served what it would refuse."""
    would_serve: list[str] = field(default_factory=list)
    last_error: str = ""

    @property
    def compared(self) -> int:
        return self.table.total()

    @property
    def share(self) -> float | None:
        """Of the compared decisions those that it agrees with; None = there is none."""
        if not self.compared:
            return None
        return (self.table[True, True] + self.table[False, False]) / self.compared

    @property
    def kappa(self) -> float | None:
        """Cohen's: agreement beyond chance, 1 = whole; None where everything has one outcome."""
        share = self.share
        if share is None:
            return None
        count = self.compared
        served = sum(n for (was, _), n in self.table.items() if was) / count
        would = sum(n for (_, is_), n in self.table.items() if is_) / count
        chance = served * would + (1 - served) * (1 - would)
        return None if chance >= 1 else (share - chance) / (1 - chance)

    def add(self, entry: ShadowResult) -> None:
        """Raises ValueError: a verdict is unknown."""
        self.asked += 1
        if entry.error is not None:
            self.failed += 1
            self.last_error = entry.error
            return
        was, would = Verdict(entry.verdict).served, Verdict(entry.would or "").served
        self.table[was, would] += 1
        if was != would:
            (self.would_refuse if was else self.would_serve).append(entry.decision)

    def to_json(self) -> JsonObject:
        return {
            "classifier": self.classifier,
            "stage": self.stage,
            "asked": self.asked,
            "failed": self.failed,
            "last_error": self.last_error or None,
            "agreement": self.share,
            "kappa": self.kappa,
            "would_refuse": self.would_refuse,
            "would_serve": self.would_serve,
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        kappa = "-" if self.kappa is None else f"{self.kappa:.2f}"
        share = "-" if self.share is None else f"{self.share:.1%}"
        shown = [
            f"{self.classifier} ({self.stage}): {self.asked} asked, {self.failed} failed, "
            f"agrees with {share} of {self.compared} (kappa {kappa})"
        ]
        for title, ids in (
            ("would refuse what was served", self.would_refuse),
            ("would serve what was refused", self.would_serve),
        ):
            if ids:
                named = ", ".join(ids[:SHOWN]) + (" ..." if len(ids) > SHOWN else "")
                shown.append(f"  {title}: {len(ids)}: {named}")
        if self.last_error:
            shown.append(f"  last failure: {self.last_error}")
        return shown


def agreements(where: pathlib.Path) -> list[Agreement]:
    """Of every classifier in a log, or in a folder of them.

    Raises:
        AuditError: there is no log, or a line of it cannot be read.
    """
    found: dict[tuple[str, str], Agreement] = {}
    for log, number, line in _lines(where):
        try:
            entry = ShadowResult.parse(line)
            key = (entry.classifier, entry.stage)
            found.setdefault(key, Agreement(*key)).add(entry)
        except (ValueError, TypeError, AttributeError):
            raise AuditError(
                f"{log}, line {number}: not a line of a log of classifiers on trial."
            ) from None
    return [found[key] for key in sorted(found)]


def _lines(where: pathlib.Path) -> Iterator[tuple[pathlib.Path, int, str]]:
    logs = sorted(where.glob("**/shadow-*.jsonl")) if where.is_dir() else [where]
    if not logs or not logs[0].is_file():
        raise AuditError(
            f"{where}: there is no log of classifiers on trial here. A policy names them in "
            "`shadow`, and the moderators log them in the folder audit/shadow."
        )
    for log in logs:
        with log.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield log, number, line
