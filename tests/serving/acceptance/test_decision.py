"""From scores to a verdict, and what a bound is worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calotype.serving.acceptance.decision import decide
from calotype.serving.acceptance.scores import GateScores, Scores
from calotype.serving.config.model.acceptance import Acceptance, GateName, Thresholds

GOOD: dict[GateName, tuple[float, ...]] = {
    "subject": (1.0,) * 24,
    "prompt": (0.9,) * 24,
    "originality": (1.0,) * 24,
    "safety": (1.0,) * 48,
    "classPrompts": (0.0,) * 24,
}


def scores(drawn: int = 48, **changed: tuple[float, ...]) -> Scores:
    gates = tuple(
        GateScores(name, changed.get(name, values), -1.0 if name == "classPrompts" else 0.0)
        for name, values in GOOD.items()
    )
    return Scores(gates, wanted=48, drawn=drawn)


@pytest.mark.parametrize(
    ("on_pass", "outcome"), [("promote", "promoted"), ("stage", "staged"), ("none", "kept")]
)
def test_what_follows_a_pass_is_said_by_the_manifest(on_pass: str, outcome: str) -> None:
    verdict = decide(scores(), Acceptance.model_validate({"onPass": on_pass}))
    assert verdict.outcome == outcome
    assert verdict.passed
    assert verdict.reasons == ()


@pytest.mark.parametrize("gate", list(GOOD))
def test_one_bad_gate_refuses_and_is_named_with_its_numbers(gate: GateName) -> None:
    bad = (-1.0,) * 24 if gate == "classPrompts" else (0.0,) * 12 + (0.3,) * 12
    verdict = decide(scores(**{gate: bad}), Acceptance())
    assert verdict.outcome == "refused"
    (reason,) = verdict.reasons
    assert reason.startswith(f"{gate}: ")
    assert f"the threshold {Thresholds().of(gate):.2f}" in reason
    assert [g.name for g in verdict.gates if not g.passed] == [gate]


def test_too_few_pictures_are_not_blamed_on_the_adapter() -> None:
    verdict = decide(scores(safety=(1.0,) * 8), Acceptance())
    (reason,) = verdict.reasons
    assert reason.startswith("safety: 8 pictures are too few") and "Raise pictures" in reason


def test_pictures_that_never_came_refuse() -> None:
    verdict = decide(scores(drawn=40), Acceptance())
    assert verdict.reasons == ("8 of 48 pictures could not be drawn.",)


def test_a_gate_without_pictures_refuses() -> None:
    assert not decide(scores(subject=()), Acceptance()).passed


def test_few_perfect_pictures_prove_less_than_many() -> None:
    few, many = (GateScores("subject", (1.0,) * n).lower_bound() for n in (8, 80))
    assert few < many < 1.0


def test_the_bound_holds_for_shares_that_are_known() -> None:
    """Of samples from a share of 0.8 it lies above 0.8 in at most about 5 % of cases."""
    rng = np.random.default_rng(3)
    above = sum(
        GateScores("subject", tuple(rng.random(24) < 0.8)).lower_bound(seed=i) > 0.8
        for i in range(200)
    )
    assert above <= 20


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_bound_is_no_higher_than_its_mean(values: list[float]) -> None:
    gate = GateScores("prompt", tuple(values))
    assert gate.lower_bound() <= gate.mean + 1e-9
    assert gate.lower_bound() == gate.lower_bound()
