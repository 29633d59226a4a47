"""Evaluates the text stage on labelled prompts: ``calotype moderation evaluate``.

The data set is a CSV with the columns ``text`` and ``label``, and perhaps ``language``. ``benign``
is the label of what must pass; every other label, whether or not a policy knows it, is a kind of
what should be refused.
"""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from calotype.moderation.decision import Decision
from calotype.moderation.documents import JsonObject
from calotype.moderation.errors import EvaluationError
from calotype.moderation.evaluation.evasions import FAMILIES

BENIGN = "benign"
RESAMPLES = 1000
SEED = 0


class PromptChecker(Protocol):
    """What is evaluated; `moderator.Moderator` is one."""

    def check_prompt(self, text: str) -> Decision: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled prompt."""

    text: str
    label: str
    language: str = ""


@dataclass(frozen=True, slots=True)
class Evasion:
    """Prompts that were refused plain, written in one of `evasions.FAMILIES`."""

    family: str
    n: int
    refused: int

    @property
    def kept(self) -> float:
        """The part that is refused still."""
        return self.refused / self.n if self.n else 1.0


@dataclass(frozen=True, slots=True)
class LabelReport:
    """All prompts of one label."""

    label: str
    n: int
    blocked: int
    flagged: int
    """Served, but marked; what is blocked is not counted again."""
    unavailable: int
    """Blocked because nothing could be checked; counted in ``blocked`` too."""
    rate: float
    """Blocked of all."""
    low: float
    high: float

    def to_json(self) -> JsonObject:
        return {
            "label": self.label,
            "measure": "false_blocks" if self.label == BENIGN else "recall",
            "n": self.n,
            "blocked": self.blocked,
            "flagged": self.flagged,
            "unavailable": self.unavailable,
            "rate": round(self.rate, 6),
            "interval": [round(self.low, 6), round(self.high, 6)],
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The result for a data set under one policy."""

    dataset: str
    policy: str
    policy_sha256: str
    labels: tuple[LabelReport, ...]
    languages: tuple[tuple[str, tuple[LabelReport, ...]], ...] = ()
    evasions: tuple[Evasion, ...] = ()

    def to_json(self) -> JsonObject:
        return {
            "languages": {
                language: {label.label: label.to_json() for label in labels}
                for language, labels in self.languages
            },
            "evasions": {
                evasion.family: {
                    "n": evasion.n,
                    "refused": evasion.refused,
                    "kept": round(evasion.kept, 6),
                }
                for evasion in self.evasions
            },
            "dataset": self.dataset,
            "policy": self.policy,
            "policy_sha256": self.policy_sha256,
            "n": sum(label.n for label in self.labels),
            "labels": {label.label: label.to_json() for label in self.labels},
        }

    def lines(self) -> list[str]:
        """A table for a terminal."""
        width = max(len("label"), *(len(label.label) for label in self.labels))
        head = (
            f"{'label':<{width}}  {'n':>6}  {'blocked':>7}  {'flagged':>7}    rate  95 % interval"
        )
        shown = [f"{self.dataset} under policy {self.policy}", head]
        shown += self._rows(self.labels, width)
        for language, labels in self.languages:
            shown += [f"language {language}", *self._rows(labels, width)]
        if self.evasions:
            shown.append("evasion            of refused plain   refused still")
        shown += [
            f"{evasion.family:<18} {evasion.n:>16} {100 * evasion.kept:>14.1f}%"
            for evasion in self.evasions
        ]
        return shown

    @staticmethod
    def _rows(labels: Sequence[LabelReport], width: int) -> list[str]:
        shown = []
        for label in labels:
            note = "  false blocks" if label.label == BENIGN else ""
            if label.unavailable:
                note += f"  {label.unavailable} could not be checked"
            shown.append(
                f"{label.label:<{width}}  {label.n:>6}  {label.blocked:>7}  {label.flagged:>7}"
                f"  {100 * label.rate:>5.1f}%  {100 * label.low:.1f}-{100 * label.high:.1f}%{note}"
            )
        return shown


def evaluate(
    path: str | pathlib.Path,
    moderator: PromptChecker,
    progress: Callable[[int, int], None] | None = None,
    *,
    evasions: bool = False,
) -> Report:
    """Checks every row. Raises EvaluationError for a file that is no such data set.

    Args:
        path: CSV with a header; columns text and label, others are ignored.
        moderator: who checks.
        progress: told how many of how many prompts are checked.
        evasions: writes what was refused in every family of `evasions.FAMILIES` as well.
    """
    rows = read(pathlib.Path(path))
    decisions: list[Decision] = []
    for number, row in enumerate(rows, start=1):
        decisions.append(moderator.check_prompt(row.text))
        if progress is not None:
            progress(number, len(rows))
    decided = list(zip(rows, decisions, strict=True))
    languages = sorted({row.language for row in rows if row.language})
    refused = [row.text for row, decision in decided if decision.blocked and row.label != BENIGN]
    return Report(
        dataset=str(path),
        policy=decisions[0].policy,
        policy_sha256=decisions[0].policy_sha256,
        labels=_label_reports(decided),
        languages=tuple(
            (name, _label_reports([pair for pair in decided if pair[0].language == name]))
            for name in languages
        ),
        evasions=tuple(_evaded(moderator, refused, progress)) if evasions else (),
    )


def _evaded(
    moderator: PromptChecker, refused: Sequence[str], progress: Callable[[int, int], None] | None
) -> Iterator[Evasion]:
    for number, (family, rewrite) in enumerate(FAMILIES.items(), start=1):
        still = sum(moderator.check_prompt(rewrite(text)).blocked for text in refused)
        if progress is not None:
            progress(number, len(FAMILIES))
        yield Evasion(family, len(refused), still)


def read(path: pathlib.Path) -> list[Row]:
    """The rows. Raises EvaluationError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or []]
            missing = [name for name in ("text", "label") if name not in columns]
            if missing:
                raise EvaluationError(
                    f"{path}: there is no column {missing[0]!r};"
                    f" a data set has the columns text and label (found: {', '.join(columns)})."
                )
            reader.fieldnames = columns
            rows = [
                (row["text"], row["label"], row.get("language") or "", reader.line_num)
                for row in reader
            ]
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: is not UTF-8 text ({error.reason}).") from error
    except csv.Error as error:
        raise EvaluationError(f"{path}: is not CSV ({error}).") from error
    for text, label, _, line in rows:
        if text is None or label is None or not label.strip():
            raise EvaluationError(f"{path}: line {line} has no text or no label.")
    if not rows:
        raise EvaluationError(f"{path}: has a header but no rows.")
    return [Row(text, label.strip(), language.strip()) for text, label, language, _ in rows]


def _label_reports(decided: Sequence[tuple[Row, Decision]]) -> tuple[LabelReport, ...]:
    """One per label, what must pass first."""
    outcomes: dict[str, list[Decision]] = {}
    for row, decision in decided:
        outcomes.setdefault(row.label, []).append(decision)
    labels = sorted(outcomes, key=lambda label: (label != BENIGN, label))
    return tuple(_label_report(label, outcomes[label]) for label in labels)


def _label_report(label: str, decisions: Sequence[Decision]) -> LabelReport:
    blocked = [decision.blocked for decision in decisions]
    low, high = bootstrap_interval(blocked, SEED)
    return LabelReport(
        label=label,
        n=len(decisions),
        blocked=sum(blocked),
        flagged=sum(decision.flagged and decision.served for decision in decisions),
        unavailable=sum(decision.unavailable for decision in decisions),
        rate=sum(blocked) / len(blocked),
        low=low,
        high=high,
    )


def bootstrap_interval(hits: Sequence[bool], seed: int) -> tuple[float, float]:
    """95 % percentile interval of a rate. Resampling yes and no is drawing from a binomial."""
    n, rate = len(hits), sum(hits) / len(hits)
    means = np.random.default_rng(seed).binomial(n, rate, RESAMPLES) / n
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
