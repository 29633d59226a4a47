"""The interfaces of classifiers, and the guard that bounds their failures.

A classifier only measures: it returns a score from 0 to 1 per category, and the policy decides what
the score means. It may be missing, raise, hang or answer nonsense; `Guard` turns each of these into
`ClassifierUnavailable`, in bounded time, and builds the classifier anew for the next check.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from calotype.moderation.errors import ClassifierTimedOut, ClassifierUnavailable
from calotype.moderation.policy.categories import Category, is_score

Pixels = NDArray[np.uint8]
Scores = Mapping[str, float]

ABANDONED_LIMIT = 4
"""Hung calls that a guard leaves behind before it refuses at once instead of starting another."""


class TextClassifier(Protocol):
    """Scores texts; every text is short enough for any encoder (`views.windows`)."""

    @property
    def name(self) -> str: ...

    def score(self, texts: Sequence[str]) -> Sequence[Scores]: ...


class ImageClassifier(Protocol):
    """Scores images, whole ones and tiles of them, as height x width x 3 of uint8."""

    @property
    def name(self) -> str: ...

    def score(self, images: Sequence[Pixels]) -> Sequence[Scores]: ...


Input = TypeVar("Input")


class Call(Generic[Input]):
    """One call on a thread of its own, which may run on after the caller timed out."""

    def __init__(self, guard: Guard[Input], inputs: Sequence[Input]) -> None:
        self._guard = guard
        self._inputs = inputs
        self._finished = threading.Event()
        self._abandoned = False
        self._result: Sequence[Scores] | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=f"moderation-{guard.name}", daemon=True).start()

    def scores(self, seconds: float) -> list[dict[Category, float]]:
        """The scores of every input. Raises ClassifierUnavailable, within ``seconds``."""
        if not self._finished.wait(max(0.0, seconds)) and self.abandon():
            self._guard.distrust()
            raise ClassifierTimedOut(
                f"Classifier {self._guard.name} did not answer within {max(0.0, seconds):.3g} s."
            )
        if self._error is not None:
            self._guard.distrust()
            raise ClassifierUnavailable(_explain(self._guard.name, self._error)) from self._error
        return _checked(self._guard.name, self._result, len(self._inputs))

    def abandon(self) -> bool:
        """Waits no more; False if the call has come back after all."""
        with self._guard.lock:
            if not self._finished.is_set() and not self._abandoned:
                self._abandoned = True
                self._guard.abandoned += 1
            return self._abandoned

    def _run(self) -> None:
        try:
            self._result = self._guard.loaded()(self._inputs)
        except BaseException as error:  # the thread's last frame: handed to the caller
            self._error = error
        finally:
            with self._guard.lock:
                self._finished.set()
                if self._abandoned:
                    self._guard.abandoned -= 1


class Guard(Generic[Input]):
    """Runs one classifier; an error, a time-out or an invalid score raises.

    Args:
        name: what a failure is called.
        make: builds the classifier. Called at the first use and again after a failure, so a model
            file that was missing is found once it is back.
    """

    def __init__(
        self, name: str, make: Callable[[], Callable[[Sequence[Input]], Sequence[Scores]]]
    ) -> None:
        self.name = name
        self.lock = threading.Lock()
        self.abandoned = 0
        """Calls left behind that have not come back."""
        self._make = make
        self._score: Callable[[Sequence[Input]], Sequence[Scores]] | None = None

    def score(self, inputs: Sequence[Input], seconds: float) -> list[dict[Category, float]]:
        """The scores of every input. Raises ClassifierUnavailable, within ``seconds``."""
        if not inputs:
            return []
        if seconds <= 0:
            raise ClassifierUnavailable(f"Classifier {self.name} had no time left to check.")
        return self.start(inputs).scores(seconds)

    def start(self, inputs: Sequence[Input]) -> Call[Input]:
        """Begins to score and returns at once. Raises ClassifierUnavailable if too much hangs."""
        with self.lock:
            if self.abandoned >= ABANDONED_LIMIT:
                raise ClassifierUnavailable(
                    f"Classifier {self.name} hangs: {self.abandoned} calls have not come back."
                )
        return Call(self, inputs)

    def distrust(self) -> None:
        """Has the classifier built anew for the next call."""
        with self.lock:
            self._score = None

    def loaded(self) -> Callable[[Sequence[Input]], Sequence[Scores]]:
        with self.lock:
            score = self._score
        if score is None:
            # Built outside of the lock: two threads may both build one, which costs time only,
            # while a build that hangs must not hang the callers behind it.
            score = self._make()
            with self.lock:
                self._score = score
        return score


def _checked(name: str, result: Sequence[Scores] | None, count: int) -> list[dict[Category, float]]:
    if result is None or len(result) != count:
        raise ClassifierUnavailable(
            f"Classifier {name} gave {0 if result is None else len(result)} answers"
            f" for {count} inputs."
        )
    checked = []
    for scores in result:
        row: dict[Category, float] = {}
        for category, score in scores.items():
            if not is_score(score):
                raise ClassifierUnavailable(
                    f"Classifier {name} answered {score!r} for {category}:"
                    " a score is a number from 0 to 1."
                )
            row[Category(category)] = min(1.0, max(0.0, float(score)))
        checked.append(row)
    return checked


def _explain(name: str, error: BaseException) -> str:
    if isinstance(error, ClassifierUnavailable):
        return str(error)
    return f"Classifier {name} failed: {type(error).__name__}: {error}"
