"""A long prompt is checked in the time that its length needs."""

from __future__ import annotations

import time
from typing import Any

import pytest

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.text_time import CHARS_IN_TIME
from calotype.moderation.testing import FixedTextClassifier
from calotype.moderation.text.prompts import PromptRules


def test_the_time_for_a_prompt_follows_from_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[float] = []
    check = PromptRules.check

    def timed(rules: PromptRules, text: str, guards: Any, deadline: float, *more: Any) -> Any:
        allowed.append(deadline - time.monotonic())
        return check(rules, text, guards, deadline, *more)

    monkeypatch.setattr(PromptRules, "check", timed)
    policy = Policy.default().model_copy(update={"timeout_seconds": 500.0})
    moderator = Moderator(policy, text_classifiers=[FixedTextClassifier({"sexual": 0.0})])
    for chars in (100, CHARS_IN_TIME, 2 * CHARS_IN_TIME):
        assert moderator.check_prompt(("a quiet harbour " * chars)[:chars]).served
    assert [round(seconds, -2) for seconds in allowed] == [500.0, 500.0, 1000.0]
