"""Classifiers on trial: they see what is checked, decide nothing, and fail only for the log."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from click.testing import CliRunner
from samples.images import drawing

from calotype.moderation.classifiers import Scores
from calotype.moderation.errors import AuditError, ClassifierUnavailable
from calotype.moderation.evaluation.agreement import agreements
from calotype.moderation.evaluation.shadow import WAITING, Shadows
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.categories import Verdict
from calotype.moderation.policy.policy import Policy
from calotype.moderation.testing import (
    FixedImageClassifier,
    FixedTextClassifier,
    HangingClassifier,
    NaNClassifier,
    RaisingClassifier,
)
from calotype.serving.commands.cli import cli

JUDGE = {"classifier": "qwen3guard", "model": "/models/guard", "sample": 1.0}
EYES = {"classifier": "falconsai", "model": "/models/eyes", "sample": 1.0}


def policy(*shadow: dict[str, Any], seconds: float = 20.0) -> Policy:
    rules = {"sexual": {"text": {"block": 0.5}, "image": {"block": 0.5}}}
    return Policy.from_spec(
        "house",
        {
            "version": 1,
            "categories": rules,
            "shadow": list(shadow),
            "timeoutSeconds": seconds,
        },
    )


class Trial:
    """A moderator whose shadows are the classifiers that a test gives."""

    def __init__(self, folder: pathlib.Path, score: float, house: Policy, **by_name: Any) -> None:
        self.log = folder / "shadow" / "shadow-one.jsonl"
        self.heard: list[tuple[str, str]] = []
        self.loaded: list[str] = []
        self._by_name = by_name
        self.stage = Moderator(
            house,
            text_classifiers=[FixedTextClassifier({"sexual": score}, containing="hat")],
            image_classifiers=[FixedImageClassifier({"sexual": score})],
        )
        self.shadows = Shadows(self.log, lambda name, what: self.heard.append((name, what)), self)
        self.stage.shadows = self.shadows

    def __call__(self, rules: Any) -> Callable[[Sequence[Any]], Sequence[Scores]]:
        self.loaded.append(rules.model)
        found = self._by_name[rules.classifier]
        if isinstance(found, Exception):
            raise found
        score: Callable[[Sequence[Any]], Sequence[Scores]] = found.score
        return score

    def entries(self) -> list[dict[str, Any]]:
        self.shadows.wait()
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def test_a_shadow_sees_what_is_checked_and_changes_nothing(tmp_path: pathlib.Path) -> None:
    strict = FixedTextClassifier({"sexual": 0.9}, name="guard")
    trial = Trial(tmp_path, 0.1, policy(JUDGE), qwen3guard=strict)
    decision = trial.stage.check_prompt("a secret hat")
    assert decision.verdict is Verdict.ALLOW
    assert not [finding for finding in decision.findings if finding.classifier == "qwen3guard"]
    (entry,) = trial.entries()
    assert entry.pop("time") > 0
    assert entry == {
        "decision": decision.id,
        "stage": "input",
        "policy": "house@1",
        "verdict": "ALLOW",
        "classifier": "qwen3guard",
        "scores": {"sexual": 0.9},
        "would": "BLOCK",
    }
    assert trial.heard == [("qwen3guard", "would_refuse")]
    assert strict.texts == ["a secret hat"] and "secret" not in trial.log.read_text()


def test_prompts_go_to_judges_and_images_to_the_others(tmp_path: pathlib.Path) -> None:
    blind = FixedTextClassifier({"sexual": 0.0})
    eyes = FixedImageClassifier({"sexual": 0.0})
    trial = Trial(tmp_path, 0.8, policy(JUDGE, EYES), qwen3guard=blind, falconsai=eyes)
    assert trial.stage.check_prompt("a hat").blocked
    assert trial.stage.check_image(drawing(1)).blocked
    entries = trial.entries()
    assert [(e["stage"], e["classifier"]) for e in entries] == [
        ("input", "qwen3guard"),
        ("output", "falconsai"),
    ]
    assert {e["would"] for e in entries} == {"ALLOW"} and {e["verdict"] for e in entries} == {
        "BLOCK"
    }
    assert trial.heard == [("qwen3guard", "would_serve"), ("falconsai", "would_serve")]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (RaisingClassifier(), "out of order"),
        (RaisingClassifier(MemoryError("no room")), "MemoryError"),
        (NaNClassifier(), "a score is a number"),
        (HangingClassifier(), "did not answer within"),
        (ClassifierUnavailable("no model in /models/guard"), "no model in /models/guard"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
    ids=["raises", "memory", "nan", "hangs", "missing", "disk"],
)
def test_a_broken_shadow_fails_no_request_and_is_logged(
    tmp_path: pathlib.Path, broken: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    trial = Trial(tmp_path, 0.1, policy(JUDGE, seconds=0.3), qwen3guard=broken)
    decisions = [trial.stage.check_prompt(f"hat {number}") for number in range(3)]
    assert {decision.verdict for decision in decisions} == {Verdict.ALLOW}
    entries = trial.entries()
    assert all(reason in entry["error"] and "would" not in entry for entry in entries)
    assert trial.heard == [("qwen3guard", "failed")] * 3
    told = [r for r in caplog.records if "on trial qwen3guard does not answer" in r.getMessage()]
    assert len(told) == 1, "told once, not with every request"
    if isinstance(broken, HangingClassifier):
        broken.release()


def test_a_log_that_cannot_be_written_fails_no_request(tmp_path: pathlib.Path) -> None:
    (tmp_path / "shadow").write_text("no folder")
    trial = Trial(tmp_path, 0.1, policy(JUDGE), qwen3guard=FixedTextClassifier({"sexual": 0.0}))
    assert trial.stage.check_prompt("a hat").verdict is Verdict.ALLOW
    trial.shadows.wait()
    assert trial.stage.check_prompt("a hat").verdict is Verdict.ALLOW


def test_what_they_cannot_keep_up_with_is_passed_over(tmp_path: pathlib.Path) -> None:
    slow = HangingClassifier()
    trial = Trial(tmp_path, 0.1, policy(JUDGE), qwen3guard=slow)
    more = 5
    decisions = [trial.stage.check_prompt(f"hat {n}") for n in range(1 + WAITING + more)]
    assert all(decision.verdict is Verdict.ALLOW for decision in decisions)
    passed = trial.heard.count(("qwen3guard", "passed_over"))
    assert more <= passed <= more + 1
    slow.release()
    assert len(trial.entries()) == len(decisions) - passed


def test_what_could_not_be_checked_is_not_compared(tmp_path: pathlib.Path) -> None:
    trial = Trial(tmp_path, 0.1, policy(JUDGE), qwen3guard=FixedTextClassifier({"sexual": 0.0}))
    assert trial.stage.check_prompt("a " * 40_000).unavailable
    trial.shadows.wait()
    assert not trial.log.exists()


def test_a_sample_is_a_share(tmp_path: pathlib.Path) -> None:
    trial = Trial(
        tmp_path, 0.1, policy(JUDGE | {"sample": 0.25}), qwen3guard=FixedTextClassifier({})
    )
    asked = 400
    for number in range(asked):
        trial.stage.check_prompt(f"hat {number}")
        trial.shadows.wait()
    assert 0.15 * asked < len(trial.entries()) < 0.35 * asked


def test_the_report_says_how_far_they_agree(tmp_path: pathlib.Path) -> None:
    loud = FixedTextClassifier({"sexual": 0.9}, containing="red")
    trial = Trial(tmp_path, 0.9, policy(JUDGE), qwen3guard=loud)
    prompts = ["a red hat", "a hat", "a red coat", "a coat", "a blue coat", "a red hat again"]
    decisions = {prompt: trial.stage.check_prompt(prompt).id for prompt in prompts}
    assert len(trial.entries()) == 6
    (found,) = agreements(tmp_path)
    assert (found.asked, found.failed, found.compared) == (6, 0, 6)
    assert found.would_refuse == [decisions["a red coat"]]
    assert found.would_serve == [decisions["a hat"]]
    assert found.share == pytest.approx(4 / 6)
    assert found.kappa == pytest.approx((4 / 6 - 0.5) / 0.5)
    done = CliRunner().invoke(cli, ["moderation", "shadow", "report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "qwen3guard (input): 6 asked, 0 failed, agrees with 66.7% of 6 (kappa 0.33)" in (
        done.output
    )
    assert decisions["a red coat"] in done.output
    as_json = CliRunner().invoke(cli, ["moderation", "shadow", "report", "--json", str(tmp_path)])
    assert json.loads(as_json.output)[0]["would_serve"] == [decisions["a hat"]]


def test_a_folder_without_a_log_and_a_damaged_one_are_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(AuditError, match="there is no log of classifiers on trial here"):
        agreements(tmp_path)
    (tmp_path / "shadow-a.jsonl").write_text('{"decision": "dec_1"}\n')
    with pytest.raises(AuditError, match=r"shadow-a\.jsonl, line 1: not a line"):
        agreements(tmp_path)
