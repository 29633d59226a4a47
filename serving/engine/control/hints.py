"""What the controls of a batch add to it.

Each pass has its own controls, or none; passes with the same branch go through it together. Hints
of several controls are summed by their scales before they are added, so that two at half a scale
are one at the whole scale, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from calotype.serving.core.conditions import acts
from calotype.serving.engine.control.branch import ControlBranch
from calotype.serving.engine.model.transformer import Rotary


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """One map of one request, ready to be used.

    Attributes:
        context: control tokens of the image that is drawn, [image tokens, control channels].
        scale: weight of its hints, 0 to 2.
        start: share of the steps after which it begins.
        end: share of the steps after which it ends.
    """

    branch: ControlBranch
    context: torch.Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts at a step, counted from 0."""
        return self.scale != 0 and acts(self.start, self.end, step, steps)


Controls = tuple[Control, ...]
"""The controls of one pass that act at this step."""


@dataclass(slots=True)
class Hints:
    """Sums of hints, by the double-stream block behind which they are added.

    Attributes:
        passes: which passes of the batch have any, rising.
        sums: by block, [len(passes), image tokens, width].
    """

    passes: list[int] = field(default_factory=list)
    sums: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, layer: int, image: torch.Tensor) -> torch.Tensor:
        """Image tokens of all passes, [passes, image tokens, width], with their hints."""
        found = self.sums.get(layer)
        if found is None or not self.passes:
            return image
        if len(self.passes) == len(image):
            return image + found
        # A copy, and not a sum with zeros for the others: they stay as they are to the bit.
        return image.index_add(0, torch.tensor(self.passes, device=image.device), found)

    def only(self, passes: Sequence[int]) -> Hints:
        """Those of some passes of the batch."""
        places = [(self.passes.index(p), i) for i, p in enumerate(passes) if p in self.passes]
        kept = [place for place, _ in places]
        return Hints([i for _, i in places], {k: sums[kept] for k, sums in self.sums.items()})


def hints_of(
    controls: Sequence[Controls],
    image: torch.Tensor,
    text: torch.Tensor,
    image_mod: torch.Tensor,
    text_mod: torch.Tensor,
    rotary: Rotary,
) -> Hints:
    """Runs the branches of a batch.

    Args:
        controls: of each pass; empty for those without.
        image: embedded image tokens and behind them reference tokens, [passes, tokens, width].
        text: embedded text tokens, likewise.
        image_mod: modulation of the passes, [passes, 6 x width].
        text_mod: likewise.
    """
    passes = [i for i, own in enumerate(controls) if own]
    places = {p: place for place, p in enumerate(passes)}
    found = Hints(passes)
    # The k-th control of every pass, then the next: in a round each pass is met once at most, so
    # that the order of the sum is that of the request in any company.
    for turn in range(max((len(own) for own in controls), default=0)):
        mine = [(i, own[turn]) for i, own in enumerate(controls) if len(own) > turn]
        for branch in dict.fromkeys(control.branch for _, control in mine):
            part = [(i, control) for i, control in mine if control.branch is branch]
            rows = [i for i, _ in part]
            every = len(rows) == len(image)
            context = _padded([control.context for _, control in part], image.shape[1])
            hints = branch(
                context,
                *(t if every else t[rows] for t in (image, text, image_mod, text_mod)),
                rotary,
            )
            scales = torch.tensor([c.scale for _, c in part], dtype=image.dtype)
            weights = scales.to(image.device, non_blocking=True).view(-1, 1, 1)
            at = torch.tensor([places[i] for i in rows], device=image.device)
            for layer, hint in zip(branch.layers, hints, strict=True):
                if layer not in found.sums:
                    found.sums[layer] = hint.new_zeros(len(passes), *hint.shape[1:])
                found.sums[layer] = found.sums[layer].index_add(0, at, hint * weights)
    return found


def _padded(contexts: Iterable[torch.Tensor], tokens: int) -> torch.Tensor:
    """[n, tokens, channels]; zeros where there are reference tokens, as VideoX-Fun pads."""
    stacked = torch.stack(list(contexts))
    return functional.pad(stacked, (0, 0, 0, tokens - stacked.shape[1]))
