"""What was measured of a candidate: a score for each picture, gate by gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calotype.serving.config.model.acceptance import GateName

RESAMPLES = 2000
CONFIDENCE = 0.95
"""One-sided."""


@dataclass(frozen=True, slots=True)
class GateScores:
    """The scores of one gate."""

    gate: GateName
    values: tuple[float, ...]
    """One for each picture that was judged; higher is better."""
    worst: float = 0.0
    """The lowest score that a picture can have."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else self.worst

    def lower_bound(self, seed: int = 0) -> float:
        """The one-sided 95 % bound of the mean, by a bootstrap over the pictures.

        One picture with the worst score is added before resampling: a plain bootstrap of pictures
        that all have the same score would claim to be certain of it after two of them.
        """
        if not self.values:
            return self.worst
        sample = np.array([*self.values, self.worst])
        rows = np.random.default_rng(seed).integers(0, len(sample), (RESAMPLES, len(sample)))
        return float(np.quantile(sample[rows].mean(axis=1), 1 - CONFIDENCE))


@dataclass(frozen=True, slots=True)
class Scores:
    """Everything that the decision knows of a candidate."""

    gates: tuple[GateScores, ...]
    wanted: int
    """Prompts that were asked for, of both kinds."""
    drawn: int
    """Of these, how many came to an end, a refusal included."""


def differences(with_it: Sequence[float], without: Sequence[float]) -> tuple[float, ...]:
    """Score by score what the candidate changed, for pictures of equal prompt and seed."""
    return tuple(a - b for a, b in zip(with_it, without, strict=True))
