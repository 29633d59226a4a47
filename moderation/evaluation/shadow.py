"""Shadow classifiers: run beside the others on a sample of the decisions, to compare them.

A shadow decides nothing and delays no response: it runs on a thread of its own after the decision
and logs its verdict beside the audit log. When its queue is full, inputs are skipped and counted.
"""

from __future__ import annotations

import hashlib
import logging
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from calotype.moderation.classifiers import Guard, Pixels, Scores
from calotype.moderation.decision import Decision
from calotype.moderation.errors import ModerationError
from calotype.moderation.evaluation.agreement import ShadowResult
from calotype.moderation.images.image_models import IMAGE_MODELS
from calotype.moderation.policy.categories import Category, Modality, Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.rules import JudgeRules, ShadowRules

log = logging.getLogger(__name__)

WAITING = 16
"""Inputs that may wait for the shadows; with a full queue the next one is skipped."""

Content = str | Pixels
Load = Callable[[ShadowRules], Callable[[Sequence[Any]], Sequence[Scores]]]
OnResult = Callable[[str, str], None]
"""Called with the classifier and one of `RESULTS`."""

RESULTS = ("agreed", "would_refuse", "would_serve", "failed", "passed_over")


@dataclass(frozen=True, slots=True)
class _Offer:
    rules: ShadowRules
    policy: Policy
    decision: Decision
    content: Content


class Shadows:
    """The classifiers on trial of one moderator.

    Args:
        path: the log; JSON lines without prompts and images.
        on_result: for metrics.
        load: builds a classifier (tests put their own in).
    """

    def __init__(
        self,
        path: pathlib.Path,
        on_result: OnResult = lambda classifier, result: None,
        load: Load | None = None,
    ) -> None:
        self._path, self._on_result, self._load = path, on_result, load or load_shadow
        self._offers: queue.Queue[_Offer] = queue.Queue(WAITING)
        self._guards: dict[ShadowRules, Guard[Any]] = {}
        self._thread: threading.Thread | None = None
        self._logged: dict[ShadowRules, str] = {}

    def offer(self, policy: Policy, decision: Decision, content: Content) -> None:
        """Queues a decision for the shadows of its policy; returns at once.

        Decisions without a verdict are left out: there is nothing to compare with.
        """
        if decision.unavailable:
            return
        for rules in policy.shadow:
            if reads(rules, content) and _sampled(decision.id, rules):
                self._start()
                try:
                    self._offers.put_nowait(_Offer(rules, policy, decision, content))
                except queue.Full:
                    self._on_result(rules.classifier, "passed_over")

    def wait(self) -> None:
        """Blocks until everything queued is done."""
        self._offers.join()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="moderation-shadows", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        while True:
            offer = self._offers.get()
            try:
                self._compare(offer)
            except Exception:  # a shadow's error must not stop the thread
                log.exception("a classifier on trial could not be asked")
            finally:
                self._offers.task_done()

    def _compare(self, offer: _Offer) -> None:
        rules, decision = offer.rules, offer.decision
        guard = self._guards.setdefault(rules, Guard(rules.classifier, lambda: self._load(rules)))
        entry = ShadowResult(
            time=round(time.time(), 3),
            decision=decision.id,
            stage=decision.stage,
            policy=decision.policy,
            verdict=decision.verdict.value,
            classifier=rules.classifier,
        )
        try:
            (scores,) = guard.score([offer.content], offer.policy.timeout_seconds)
        except ModerationError as error:
            entry, result = replace(entry, error=str(error)), "failed"
            self._log_once(rules, str(error))
        else:
            would = would_be(offer.policy, scores, decision.stage)
            rounded = {category.value: round(score, 4) for category, score in scores.items()}
            entry = replace(entry, scores=rounded, would=would.value)
            result = _result(decision.verdict, would)
            self._logged.pop(rules, None)
        self._append(entry)
        self._on_result(rules.classifier, result)

    def _append(self, entry: ShadowResult) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(entry.line())

    def _log_once(self, rules: ShadowRules, problem: str) -> None:
        """Once for each problem: a missing model fails again with every request."""
        if self._logged.get(rules) != problem:
            self._logged[rules] = problem
            log.error("the classifier on trial %s does not answer: %s", rules.classifier, problem)


def reads(rules: ShadowRules, content: Content) -> bool:
    """Whether a shadow takes such content: judges take prompts, the others images."""
    return isinstance(content, str) is (rules.classifier not in IMAGE_MODELS)


def would_be(policy: Policy, scores: Mapping[Category, float], stage: str) -> Verdict:
    """What the policy would make of a shadow's scores if they were all that it had."""
    worst = Verdict.ALLOW
    for category, score in scores.items():
        if stage == "output":
            rule = policy.rule(category, Modality.IMAGE)
        else:
            rule = policy.rule(category, Modality.JUDGE)
            if rule == type(rule)():
                rule = policy.rule(category, Modality.TEXT)
        effect = rule.verdict(score)
        if effect is not None and effect[0].severity > worst.severity:
            worst = effect[0]
    return worst


def load_shadow(rules: ShadowRules) -> Callable[[Sequence[Any]], Sequence[Scores]]:
    """The classifier of a policy's `ShadowRules`. Raises ClassifierUnavailable."""
    if rules.classifier in IMAGE_MODELS:
        return IMAGE_MODELS[rules.classifier](pathlib.Path(rules.model)).score
    from calotype.moderation.text.judges import Judge  # torch, only where a policy asks for it

    judge = JudgeRules.model_validate({"format": rules.classifier, "model": rules.model})
    return Judge(judge).score


def _sampled(decision: str, rules: ShadowRules) -> bool:
    """Whether a decision is in the sample; by its id, so that replicas agree."""
    digest = hashlib.sha256(f"{decision} {rules.classifier} {rules.model}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < rules.sample * 2**64


def _result(was: Verdict, would: Verdict) -> str:
    if was.served == would.served:
        return "agreed"
    return "would_refuse" if was.served else "would_serve"
