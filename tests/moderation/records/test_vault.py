"""Prompts are kept sealed, for their time, and no longer."""

from __future__ import annotations

import pathlib

import pytest

from calotype.moderation.errors import AuditError
from calotype.moderation.records.vault import DAY, PromptVault

PROMPT = "a portrait of my neighbour \ud800"
"""With half a surrogate, as broken clients send it."""


class Clock:
    now = 20_000 * DAY

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def vault(folder: pathlib.Path, clock: Clock, writer: str = "one") -> PromptVault:
    return PromptVault(folder / "prompts", writer, clock)


def test_a_prompt_is_read_back_by_its_decision_and_lies_nowhere_in_clear(
    tmp_path: pathlib.Path, clock: Clock
) -> None:
    vault(tmp_path, clock).keep("dec_1", PROMPT, 30)
    vault(tmp_path, clock, "two").keep("dec_2", "another", 30)
    reader = vault(tmp_path, clock, "reader")
    assert reader.read("dec_1") == PROMPT
    assert reader.read("dec_2") == "another"
    for path in (tmp_path / "prompts").iterdir():
        assert b"neighbour" not in path.read_bytes()
        if path.suffix == ".key":
            assert path.stat().st_mode & 0o077 == 0, "keys are their owner's alone"


def test_equal_prompts_have_equal_digests_under_one_key_only(
    tmp_path: pathlib.Path, clock: Clock
) -> None:
    first, again = vault(tmp_path, clock), vault(tmp_path, clock, "two")
    assert first.digest(PROMPT) == again.digest(PROMPT) != first.digest(PROMPT + ".")
    assert vault(tmp_path / "elsewhere", clock).digest(PROMPT) != first.digest(PROMPT)


def test_a_copy_ends_with_its_time(tmp_path: pathlib.Path, clock: Clock) -> None:
    one = vault(tmp_path, clock)
    one.keep("dec_1", PROMPT, 30)
    clock.now += 29 * DAY
    one.keep("dec_2", "later", 30)
    assert one.read("dec_1") == PROMPT
    clock.now += 2 * DAY
    one.keep("dec_3", "latest", 30)
    with pytest.raises(AuditError, match="its time is over"):
        one.read("dec_1")
    assert one.read("dec_2") == "later"
    assert not list((tmp_path / "prompts").glob("day-20000*"))


def test_a_changed_copy_is_told(tmp_path: pathlib.Path, clock: Clock) -> None:
    one = vault(tmp_path, clock)
    one.keep("dec_1", PROMPT, 30)
    one.keep("dec_2", "another", 30)
    (path,) = (tmp_path / "prompts").glob("*.jsonl")
    lines = path.read_text().splitlines()
    swapped = lines[1].replace("dec_2", "dec_1")
    path.write_text(swapped + "\n")
    with pytest.raises(AuditError, match="was changed"):
        one.read("dec_1")
