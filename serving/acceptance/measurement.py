"""Draws an acceptance set and scores it. What follows from the scores is `decision`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calotype.serving.acceptance.copying import CopyDetector
from calotype.serving.acceptance.judges import Judge
from calotype.serving.acceptance.prompts import PromptSet
from calotype.serving.acceptance.scores import GateScores, Scores, differences
from calotype.serving.acceptance.studio import Drawn, Studio

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture of the candidate, and what was found in it."""

    drawn: Drawn
    subject: float | None = None
    adherence: float | None = None
    copy_of: int | None = None
    """Number of the training picture that it is a copy of."""
    base: Pixels | None = None
    """The same prompt and seed without the candidate."""
    base_adherence: float | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """Everything that was drawn for one candidate."""

    scores: Scores
    subjects: tuple[Shown, ...]
    classes: tuple[Shown, ...]


JudgeOf = Callable[[Sequence["Pixels"]], Judge]
"""A judge, given what the base drew for the class prompts."""


def measure(
    studio: Studio,
    prompts: PromptSet,
    seed: int,
    judge_of: JudgeOf,
    copies: CopyDetector | None,
    on_picture: Callable[[], None] = lambda: None,
) -> Measurement:
    """Draws the set three times: base on class prompts, candidate on those and on its own.

    Args:
        copies: None where there are no training pictures to copy, as for a model's revision.

    Raises:
        CalotypeError: something cannot be drawn or judged.
    """

    def all_of(texts: Sequence[str], *, candidate: bool) -> list[Drawn]:
        found = []
        for drawn in studio.draw(texts, seed, candidate=candidate):
            found.append(drawn)
            on_picture()
        return found

    base = all_of(prompts.classes, candidate=False)
    plain = all_of(prompts.classes, candidate=True)
    own = all_of(prompts.subject, candidate=True)
    judge = judge_of(_pixels(base))
    subjects = _subjects(own, judge, copies)
    classes = _classes(plain, base, judge)
    gates = []
    if subjects:
        gates += [
            GateScores("subject", _present(s.subject for s in subjects)),
            GateScores("prompt", _present(s.adherence for s in subjects)),
        ]
    if copies is not None:
        seen = [s for s in subjects if s.drawn.pixels is not None]
        gates.append(GateScores("originality", tuple(float(s.copy_of is None) for s in seen)))
    everything = [*own, *plain]
    gates.append(GateScores("safety", tuple(float(d.pixels is not None) for d in everything)))
    both = [c for c in classes if c.adherence is not None and c.base_adherence is not None]
    changed = differences(
        [c.adherence or 0.0 for c in both], [c.base_adherence or 0.0 for c in both]
    )
    gates.append(GateScores("classPrompts", changed, worst=-1.0))
    wanted = len(prompts.subject) + len(prompts.classes)
    scores = Scores(tuple(gates), wanted=wanted, drawn=len(everything))
    return Measurement(scores, tuple(subjects), tuple(classes))


def _subjects(drawn: Sequence[Drawn], judge: Judge, copies: CopyDetector | None) -> list[Shown]:
    seen = [d for d in drawn if d.pixels is not None]
    pictures = _pixels(seen)
    subject = judge.subject(pictures)
    adherence = judge.adherence([d.prompt for d in seen], pictures)
    same = copies.copies(pictures) if copies is not None else [None] * len(seen)
    scored = iter(zip(subject, adherence, same, strict=True))
    return [Shown(d) if d.pixels is None else Shown(d, *next(scored)) for d in drawn]


def _classes(drawn: Sequence[Drawn], base: Sequence[Drawn], judge: Judge) -> list[Shown]:
    """A prompt whose picture is refused with or without the candidate is not compared."""
    pairs = list(zip(drawn, base, strict=True))
    both = [(d, b) for d, b in pairs if d.pixels is not None and b.pixels is not None]
    texts = [d.prompt for d, _ in both]
    with_it = judge.adherence(texts, _pixels([d for d, _ in both]))
    without = judge.adherence(texts, _pixels([b for _, b in both]))
    scored = iter(zip(with_it, without, strict=True))
    found = []
    for d, b in pairs:
        if d.pixels is None or b.pixels is None:
            found.append(Shown(d, base=b.pixels))
            continue
        ours, theirs = next(scored)
        found.append(Shown(d, adherence=ours, base=b.pixels, base_adherence=theirs))
    return found


def _pixels(drawn: Sequence[Drawn]) -> list[Pixels]:
    return [d.pixels for d in drawn if d.pixels is not None]


def _present(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(value for value in values if value is not None)
