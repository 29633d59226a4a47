"""A moderator replica gives no decision that it cannot record."""

from __future__ import annotations

import asyncio
import pathlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray import serve

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.records.audit import verify
from calotype.moderation.testing import FixedImageClassifier, FixedTextClassifier
from calotype.serving.core.decision import Decision
from calotype.serving.core.errors import ModerationUnavailable
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.deployments.replicas.moderator import ModeratorDeployment

GREY = np.full((64, 64, 3), 127, dtype=np.uint8)


@pytest.fixture
def moderator(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> ModeratorDeployment:
    def load(**given: Any) -> Moderator:
        return Moderator(
            Policy.default(),
            text_classifiers=[FixedTextClassifier({"sexual": 0.0})],
            image_classifiers=[FixedImageClassifier({"sexual": 0.0})],
            **given,
        )

    Database.open(sqlite_url(tmp_path)).close()
    monkeypatch.setattr(Moderator, "load", load)
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(replica_tag="one"))
    return ModeratorDeployment(str(tmp_path / "audit"), sqlite_url(tmp_path))


def checks(moderator: ModeratorDeployment) -> list[Any]:
    return [
        asyncio.run(moderator.check_prompt("a fox")),
        asyncio.run(moderator.check_image(GREY, "a fox", [], None)),
    ]


def test_each_decision_is_recorded_and_says_which_takedowns_it_knew(
    moderator: ModeratorDeployment, tmp_path: pathlib.Path
) -> None:
    prompt, image = map(Decision.from_payload, checks(moderator))
    assert (prompt.verdict, image.verdict) == ("ALLOW", "ALLOW")
    assert (prompt.newest_takedown, image.newest_takedown) == (None, 0)
    assert verify(tmp_path / "audit" / "audit-one.jsonl") == 2


def test_a_log_that_somebody_emptied_ends_all_decisions(
    moderator: ModeratorDeployment, tmp_path: pathlib.Path
) -> None:
    checks(moderator)
    (tmp_path / "audit" / "audit-one.jsonl").write_text("")
    for check in (
        moderator.check_prompt("a fox"),
        moderator.check_image(GREY, "a fox", [], None),
    ):
        with pytest.raises(ModerationUnavailable, match="audit log cannot be written"):
            asyncio.run(check)
