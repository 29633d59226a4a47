"""Who judges a picture: whether it shows the subject, and how well it obeys its prompt.

Two implementations of one protocol: `exact_judge.ExactJudge` reads the flat shapes of the embedded
model, `embedding_judge.EmbeddingJudge` compares embeddings of crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


class Judge(Protocol):
    """Scores of pictures, from 0 to 1, one for each."""

    name: str

    def subject(self, pictures: Sequence[Pixels]) -> list[float]:
        """How surely each shows the subject of the training pictures."""
        ...

    def adherence(self, prompts: Sequence[str], pictures: Sequence[Pixels]) -> list[float]:
        """How well each obeys its prompt, whatever stands for the subject left aside."""
        ...
