"""The audit log tells when it was tampered with."""

from __future__ import annotations

import json
import pathlib

import pytest

from calotype.moderation.errors import AuditError
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.records.audit import AuditLog, verify
from calotype.moderation.testing import FixedTextClassifier


@pytest.fixture
def log(tmp_path: pathlib.Path) -> pathlib.Path:
    """Five decisions of two runs of one writer."""
    path = tmp_path / "audit.jsonl"
    moderator = Moderator(Policy.default(), text_classifiers=[FixedTextClassifier({"sexual": 0.9})])
    for count in (3, 2):
        audit = AuditLog(path)
        for _ in range(count):
            audit.append(moderator.check_prompt("a private prompt").to_payload())
        audit.close()
    return path


def test_an_untouched_log_verifies_and_holds_no_prompt(log: pathlib.Path) -> None:
    assert verify(log) == 5
    assert "private" not in log.read_text()
    first = json.loads(log.read_text().splitlines()[0])["decision"]
    assert first["verdict"] == "BLOCK"
    assert first["policy"] == "default@1"


@pytest.mark.parametrize("damage", ["change", "remove", "swap", "garble"])
def test_tampering_is_told_with_its_line(log: pathlib.Path, damage: str) -> None:
    lines = log.read_text().splitlines(keepends=True)
    match damage:
        case "change":
            lines[2] = lines[2].replace("BLOCK", "ALLOW")
        case "remove":
            del lines[2]
        case "swap":
            lines[2], lines[3] = lines[3], lines[2]
        case "garble":
            lines[2] = lines[2][:20] + "\n"
    log.write_text("".join(lines))
    with pytest.raises(AuditError, match="line 3"):
        verify(log)


def test_a_half_written_line_is_cut_off_and_the_chain_goes_on(log: pathlib.Path) -> None:
    with log.open("a") as file:
        file.write('{"time": 1, "deci')
    audit = AuditLog(log)
    audit.append({"id": "dec_1", "verdict": "ALLOW"})
    audit.close()
    assert verify(log) == 6
