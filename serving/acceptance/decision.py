"""From scores to a verdict. Pure: it draws nothing, reads nothing, and knows no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from calotype.serving.acceptance.scores import GateScores, Scores
from calotype.serving.config.model.acceptance import Acceptance, GateName, GateResult

Outcome = Literal["promoted", "staged", "kept", "refused"]

_WORDS: dict[GateName, str] = {
    "subject": "what is drawn for the trigger word is not the subject of the training pictures",
    "prompt": "the rest of a prompt with the trigger word is not obeyed",
    "originality": "training pictures are drawn again instead of new ones",
    "safety": "the safety stage refuses what is drawn for harmless prompts",
    "classPrompts": "prompts without the trigger word are obeyed less than without it",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows for a candidate."""

    outcome: Outcome
    gates: tuple[GateResult, ...]
    reasons: tuple[str, ...]
    """One sentence for each gate that it did not pass; empty where it passed."""

    @property
    def passed(self) -> bool:
        return self.outcome != "refused"


def decide(scores: Scores, acceptance: Acceptance) -> Verdict:
    """A candidate passes when the lower bound of every gate reaches its threshold."""
    gates = tuple(_result(gate, acceptance) for gate in scores.gates)
    reasons = [gate.reason for gate in gates if gate.reason is not None]
    if scores.drawn < scores.wanted:
        reasons.append(
            f"{scores.wanted - scores.drawn} of {scores.wanted} pictures could not be drawn."
        )
    if reasons:
        return Verdict("refused", gates, tuple(reasons))
    passed: dict[str, Outcome] = {"promote": "promoted", "stage": "staged", "none": "kept"}
    return Verdict(passed[acceptance.on_pass], gates, ())


def _result(scores: GateScores, acceptance: Acceptance) -> GateResult:
    bound, threshold = scores.lower_bound(), acceptance.thresholds.of(scores.gate)
    passed = bound >= threshold
    reason = None
    if not passed:
        reason = (
            f"{scores.gate}: {_WORDS[scores.gate]}: the lower bound is {bound:.2f} (mean "
            f"{scores.mean:.2f} of {len(scores.values)} pictures), the threshold {threshold:.2f}."
        )
        if scores.mean >= threshold:
            reason = (
                f"{scores.gate}: {len(scores.values)} pictures are too few to be sure of it: their "
                f"mean is {scores.mean:.2f}, its lower bound {bound:.2f}, the threshold "
                f"{threshold:.2f}. Raise pictures of the acceptance set."
            )
    return GateResult(
        name=scores.gate,
        score=round(scores.mean, 4),
        lower_bound=round(bound, 4),
        threshold=threshold,
        passed=passed,
        reason=reason,
    )
