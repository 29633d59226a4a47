"""Control tokens: what a branch reads of a map. Runs the autoencoder once for each map."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from calotype.serving.engine.control.branch import control_channels
from calotype.serving.engine.model.conditioning import Conditioner
from calotype.serving.engine.sizing.configs import TransformerConfig

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

KEPT_BYTES = 256 * 2**20
"""Memory for control tokens of maps seen before; a map of 1024x1024 takes 2 MB in bfloat16."""


class ControlContexts:
    """Encodes maps, each once while it is among those seen last.

    Args:
        conditioner: what makes tokens of pixels.
        kept_bytes: for maps seen before, least recently used dropped first.
    """

    def __init__(
        self, conditioner: Conditioner, config: TransformerConfig, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self._conditioner, self._channels = conditioner, control_channels(config)
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.encoded = 0
        """Maps that the autoencoder saw."""

    def of(self, pixels: Pixels) -> torch.Tensor:
        """Control tokens of a map, [image tokens, control channels].

        Mask and masked image are zero, which says that everything is drawn anew.
        """
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        found = self._kept.get(digest)
        if found is None:
            tokens = self._conditioner.tokens(pixels)
            found = functional.pad(tokens, (0, self._channels - tokens.shape[1]))
            self.encoded += 1
            self._kept[digest] = found
            while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > self._kept_bytes:
                self._kept.popitem(last=False)
        self._kept.move_to_end(digest)
        return found


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
