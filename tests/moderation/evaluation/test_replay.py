"""A new policy is tried on what was measured before anybody meets it."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

from calotype.moderation.errors import AuditError
from calotype.moderation.evaluation.replay import replay
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.records.audit import AuditLog
from calotype.moderation.testing import FixedImageClassifier, FixedTextClassifier


def policy(**changes: Any) -> Policy:
    spec = {
        "version": 1,
        "lists": ["sexual"],
        "categories": {
            "sexual": {"text": {"block": 0.5}, "image": {"block": 0.9}, "tile": {"block": 0.4}}
        },
    }
    return Policy.from_spec("house", spec | changes)


@pytest.fixture
def log(tmp_path: pathlib.Path) -> pathlib.Path:
    """Prompts at 0.6, 0.3 and one on a list, and an image at 0.6 in whole and in its tiles."""
    audit = AuditLog(tmp_path / "audit.jsonl")
    for score, text in ((0.6, "one"), (0.3, "two"), (0.0, "hardcore porn")):
        text_classifier = FixedTextClassifier({"sexual": score})
        stage = Moderator(policy(), text_classifiers=[text_classifier])
        audit.append(stage.check_prompt(text).to_payload())
    stage = Moderator(policy(), image_classifiers=[FixedImageClassifier({"sexual": 0.6})])
    pixels = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    audit.append(stage.check_image(pixels).to_payload())
    audit.close()
    return tmp_path


def test_the_same_policy_changes_nothing(log: pathlib.Path) -> None:
    found = replay(log, policy())
    assert found.compared == 4 and not found.newly_refused and not found.newly_served
    assert found.before == found.after == {"BLOCK": 3, "ALLOW": 1}
    assert "Nobody would be answered otherwise." in found.lines()


def test_a_stricter_one_names_who_would_be_refused(log: pathlib.Path) -> None:
    stricter = policy(version=2, categories={"sexual": {"text": {"block": 0.2}}})
    found = replay(log / "audit.jsonl", stricter)
    assert {name: len(ids) for name, ids in found.newly_refused.items()} == {"sexual": 1}
    assert found.newly_refused["sexual"][0].startswith("dec_")
    # Its images have no thresholds any more.
    assert {name: len(ids) for name, ids in found.newly_served.items()} == {"sexual": 1}
    assert found.to_json()["after"] == {"BLOCK": 3, "ALLOW": 1}


def test_modalities_have_thresholds_of_their_own(log: pathlib.Path) -> None:
    rules = {"text": {"block": 0.5}, "image": {"block": 0.9}, "tile": {"block": 0.7}}
    found = replay(log, policy(version=2, categories={"sexual": rules}))
    assert sum(map(len, found.newly_served.values())) == 1 and not found.newly_refused


def test_a_list_that_is_dropped_serves_what_it_refused(log: pathlib.Path) -> None:
    found = replay(log, policy(version=2, lists=[]))
    assert sum(map(len, found.newly_served.values())) == 1


def test_what_was_not_measured_is_counted_apart(tmp_path: pathlib.Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    audit.append({"id": "dec_old", "verdict": "BLOCK", "categories": ["hate"]})
    audit.close()
    assert replay(tmp_path, policy()).skipped == 1


def test_no_log_is_said(tmp_path: pathlib.Path) -> None:
    with pytest.raises(AuditError, match="there is no audit log"):
        replay(tmp_path, policy())
    (tmp_path / "audit.jsonl").write_text("{}\n")
    with pytest.raises(AuditError, match="line 1"):
        replay(tmp_path, policy())
