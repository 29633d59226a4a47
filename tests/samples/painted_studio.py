"""A studio that paints what its prompts say, without a model: each way an adapter can be wrong."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from tests.samples import concepts

from calotype.serving.acceptance.exact_judge import read_prompt
from calotype.serving.acceptance.studio import Drawn
from calotype.serving.training.scenes import POSITIONS, SIZES, Scene, Thing, render, to_uint8

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

Kind = Literal["good", "random", "overfit", "wrong concept", "copied", "unsafe"]
KINDS: tuple[Kind, ...] = ("good", "random", "overfit", "wrong concept", "copied", "unsafe")


class PaintedStudio:
    """Draws as an adapter of some kind would.

    Args:
        training: its training pictures, which a copying one draws again.
        slips: share of pictures that go wrong in a good one.
    """

    def __init__(
        self,
        kind: Kind,
        concept: str,
        other: str,
        training: Sequence[Pixels],
        slips: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._kind, self._concept, self._other = kind, concept, other
        self._training, self._slips = training, slips
        self._rng = random.Random(seed)

    def draw(self, prompts: Sequence[str], seed: int, *, candidate: bool) -> Iterator[Drawn]:
        for number, prompt in enumerate(prompts):
            named = concepts.TRIGGER in prompt
            concept = self._shown(named) if candidate else None
            slipped = candidate and named and self._rng.random() < self._slips
            if self._kind == "unsafe" and candidate and self._rng.random() < 0.4:
                yield Drawn(prompt, seed + number, None, "refused")
            elif self._kind == "copied" and candidate and named:
                yield Drawn(prompt, seed + number, self._rng.choice(self._training))
            else:
                pixels = self._paint(prompt, None if slipped else concept, named)
                yield Drawn(prompt, seed + number, pixels)

    def _shown(self, named: bool) -> str | None:
        """The concept that is drawn instead of the shape that the prompt names."""
        if self._kind == "random":
            return None
        if not named:
            return self._concept if self._kind == "overfit" and self._rng.random() < 0.6 else None
        return self._other if self._kind == "wrong concept" else self._concept

    def _paint(self, prompt: str, concept: str | None, named: bool) -> Pixels:
        asked = read_prompt(prompt)
        size = next(size for size in SIZES if size in prompt)
        assert asked.color and asked.background and asked.position
        if concept is not None:
            showing = concepts.Showing(asked.color, asked.background, asked.position, size)
            return concepts.draw(concept, showing, self._rng)
        shape = asked.shape or self._rng.choice(("circle", "square"))
        thing = Thing(shape, asked.color, asked.position, size)
        assert asked.position in POSITIONS and named == (asked.shape is None)
        return to_uint8(render([Scene(asked.background, (thing,), prompt)], None))[0].numpy()
