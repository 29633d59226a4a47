"""The seam at which classifiers plug in, and the guard that none of them can get around.

A classifier only measures: it returns a score from 0 to 1 per category, and the policy decides what
the score means. It may be missing, raise, hang or answer nonsense; `Guard` turns each of these into
`ClassifierUnavailable`, in bounded time, and tries afresh with the next judgement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from calotype.moderation.errors import ClassifierUnavailable
from calotype.moderation.policy import Category, is_score

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
    """Scores pictures, whole ones and tiles of them, as height x width x 3 of uint8."""

    @property
    def name(self) -> str: ...

    def score(self, pictures: Sequence[Pixels]) -> Sequence[Scores]: ...


Input = TypeVar("Input")


class _Call(Generic[Input]):
    """One call on a thread of its own, which may outlive the caller's patience."""

    def __init__(self, run: Callable[[], Sequence[Scores]], done: Callable[[], None]) -> None:
        self._run = run
        self._done = done
        self.finished = threading.Event()
        self.result: Sequence[Scores] | None = None
        self.error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self.result = self._run()
        except BaseException as error:  # the thread's last frame: handed to the caller
            self.error = error
        finally:
            self.finished.set()
            self._done()


class Guard(Generic[Input]):
    """Runs one classifier so that it answers well or not at all.

    Args:
        name: what a failure is called.
        make: builds the classifier. Called at the first use and again after a failure, so a model
            file that was missing is found once it is back.
    """

    def __init__(
        self, name: str, make: Callable[[], Callable[[Sequence[Input]], Sequence[Scores]]]
    ) -> None:
        self.name = name
        self._make = make
        self._score: Callable[[Sequence[Input]], Sequence[Scores]] | None = None
        self._lock = threading.Lock()
        self._running = 0
        self._abandoned = 0

    def score(self, inputs: Sequence[Input], seconds: float) -> list[dict[Category, float]]:
        """The scores of every input. Raises ClassifierUnavailable, within ``seconds``."""
        if not inputs:
            return []
        if seconds <= 0:
            raise ClassifierUnavailable(f"Classifier {self.name} had no time left to judge.")
        with self._lock:
            if self._abandoned >= ABANDONED_LIMIT:
                raise ClassifierUnavailable(
                    f"Classifier {self.name} hangs: {self._abandoned} calls have not come back."
                )
        abandoned = False

        def done() -> None:
            with self._lock:
                if abandoned:
                    self._abandoned -= 1

        call: _Call[Input] = _Call(lambda: self._loaded()(inputs), done)
        threading.Thread(target=call, name=f"moderation-{self.name}", daemon=True).start()
        if not call.finished.wait(seconds):
            with self._lock:
                if not call.finished.is_set():
                    abandoned = True
                    self._abandoned += 1
                    self._score = None
            if abandoned:
                raise ClassifierUnavailable(
                    f"Classifier {self.name} did not answer within {seconds:g} s."
                )
        if call.error is not None:
            with self._lock:
                self._score = None
            raise ClassifierUnavailable(_explain(self.name, call.error)) from call.error
        return self._checked(call.result, len(inputs))

    def _loaded(self) -> Callable[[Sequence[Input]], Sequence[Scores]]:
        with self._lock:
            score = self._score
        if score is None:
            # Built outside of the lock: two threads may both build one, which costs time only,
            # while a build that hangs must not hang the callers behind it.
            score = self._make()
            with self._lock:
                self._score = score
        return score

    def _checked(self, result: Sequence[Scores] | None, count: int) -> list[dict[Category, float]]:
        if result is None or len(result) != count:
            raise ClassifierUnavailable(
                f"Classifier {self.name} gave {0 if result is None else len(result)} answers"
                f" for {count} inputs."
            )
        checked = []
        for scores in result:
            row: dict[Category, float] = {}
            for category, score in scores.items():
                if not is_score(score):
                    raise ClassifierUnavailable(
                        f"Classifier {self.name} answered {score!r} for {category}:"
                        " a score is a number from 0 to 1."
                    )
                row[Category(category)] = min(1.0, max(0.0, float(score)))
            checked.append(row)
        return checked


def _explain(name: str, error: BaseException) -> str:
    if isinstance(error, ClassifierUnavailable):
        return str(error)
    return f"Classifier {name} failed: {type(error).__name__}: {error}"
