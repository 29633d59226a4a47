"""The result of a fetch: what fits into a termination message, and which faults are final."""

from __future__ import annotations

import pytest

from calotype.serving.wire.fetch_faults import Fault
from calotype.serving.wire.fetch_result import (
    MAX_BYTES,
    FetchedWeights,
    FetchRefused,
    read_result,
    render,
)


@pytest.mark.parametrize(
    "fault",
    [
        Fault.ORDER_INVALID,
        Fault.SOURCE_INVALID,
        Fault.LICENCE_NOT_ALLOWED,
        Fault.NOT_FOUND,
        Fault.CREDENTIALS_REJECTED,
        Fault.CHECKSUM_MISMATCH,
        Fault.BAD_WEIGHTS,
        Fault.MODEL_INCOMPLETE,
        Fault.WRONG_BASE_MODEL,
    ],
)
def test_a_fault_that_only_a_change_can_heal_is_final(fault: Fault) -> None:
    assert FetchRefused(reason=fault.value, message="").final


@pytest.mark.parametrize(
    "reason",
    ["Unreachable", "VolumeFull", "VolumeFailed", "BaseModelMissing", "FetchFailed", "LaterWord"],
)
def test_a_fault_that_may_pass_is_tried_again(reason: str) -> None:
    assert not FetchRefused(reason=reason, message="").final


def test_a_fault_in_the_file_is_final() -> None:
    assert all(fault.final for fault in Fault if fault.in_file)


def test_a_fault_is_its_word() -> None:
    assert Fault("NotFound") is Fault.NOT_FOUND
    assert f"{Fault.NOT_FOUND}" == "NotFound"


def test_a_long_result_is_shortened_until_it_fits() -> None:
    modules = tuple(f"blocks.{number}.attention.to_q" for number in range(500))
    weights = FetchedWeights(
        revision="r", sha256="s", size_bytes=1, path="/p", rank=8, target_modules=modules
    )
    text = render(weights)
    assert len(text.encode()) <= MAX_BYTES
    shortened = read_result(text)
    assert isinstance(shortened, FetchedWeights)
    assert shortened.rank == 8
    assert modules[:20] == shortened.target_modules[:20]


def test_a_long_sentence_is_cut() -> None:
    text = render(FetchRefused(reason="BadHeader", message="ä" * 9000))
    assert len(text.encode()) <= MAX_BYTES
    refused = read_result(text)
    assert isinstance(refused, FetchRefused)
    assert refused.message.startswith("ääää")
    assert refused.message.endswith(" ...")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "Killed", '{"ok": true}', '{"ok": false, "version": 2}']
)
def test_what_is_no_result_is_none(text: str) -> None:
    assert read_result(text) is None
