"""What trust and safety type: replay a policy on the log, open a kept prompt."""

from __future__ import annotations

import json
import pathlib

import pytest
from click.testing import CliRunner

from calotype.moderation.errors import AuditError
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.records.audit import AuditLog, verify
from calotype.moderation.records.vault import PromptVault
from calotype.moderation.testing import FixedTextClassifier
from calotype.serving.commands.cli import cli

STRICTER = """
version: 2
extends: floor
categories:
  violence: {text: {block: 0.2}}
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """The audit folder of a service that let a prompt with violence 0.4 pass."""
    stage = Moderator(Policy.default(), text_classifiers=[FixedTextClassifier({"violence": 0.4})])
    decision = stage.check_prompt("a battle").to_payload()
    assert decision["verdict"] == "ALLOW"
    audit = AuditLog(tmp_path / "audit" / "audit-one.jsonl")
    vault = PromptVault(tmp_path / "audit" / "prompts", "one")
    vault.keep(decision["id"], "a battle", 30)
    audit.append(decision, vault.digest("a battle"))
    audit.close()
    return tmp_path / "audit"


def decision_id(folder: pathlib.Path) -> str:
    line = json.loads((folder / "audit-one.jsonl").read_text())
    assert len(line["content"]) == 64
    return str(line["decision"]["id"])


def test_a_policy_is_replayed_on_the_log(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "house.yaml").write_text(STRICTER)
    arguments = ["moderation", "replay", str(folder), "--policy", str(tmp_path / "house.yaml")]
    shown = CliRunner().invoke(cli, arguments)
    assert f"would be refused now: 1 for violence: {decision_id(folder)}" in shown.output
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    assert found["policy"] == "house@2" and found["after"] == {"BLOCK": 1}


def test_opening_a_prompt_is_on_record(folder: pathlib.Path) -> None:
    wanted = decision_id(folder)
    shown = CliRunner().invoke(cli, ["moderation", "audit", "prompt", wanted, str(folder)])
    assert shown.output == "a battle\n"
    opened = folder / "opened" / "audit.jsonl"
    assert verify(opened) == 1 and wanted in opened.read_text()
    unknown = CliRunner().invoke(cli, ["moderation", "audit", "prompt", "dec_no", str(folder)])
    assert isinstance(unknown.exception, AuditError)
    assert verify(opened) == 1
