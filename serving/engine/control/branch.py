"""The control branch: copies of double-stream blocks that read a control map beside the image.

The VACE pattern in the form of FLUX.2-dev-Fun-Controlnet-Union, whose parameter names it has
(VideoX-Fun, ``Flux2ControlTransformer2DModel``): one block for every second double-stream block of
the denoiser, 0, 2, 4 and 6 in FLUX.2 [dev]. Each gives a *hint*, which is added to the image tokens
behind the denoiser's own block; the denoiser's weights stay as they are.
"""

from __future__ import annotations

import torch
from torch import nn

from calotype.serving.engine.model.transformer import DoubleStreamBlock, Rotary, Transformer
from calotype.serving.engine.sizing.configs import TransformerConfig

MASK_CHANNELS = 4
"""Of a token: the mask's 2 x 2 latent pixels."""


def control_channels(config: TransformerConfig) -> int:
    """Channels of a control token: the map's latents, the mask, the masked image's latents."""
    return 2 * config.in_channels + MASK_CHANNELS


def control_layers(config: TransformerConfig) -> tuple[int, ...]:
    """The double-stream blocks behind which hints are added."""
    return tuple(range(0, config.num_layers, 2))


class ControlBlock(DoubleStreamBlock):
    """A double-stream block with a projection of what it gives, and the first of what it gets."""

    def __init__(self, config: TransformerConfig, *, first: bool) -> None:
        super().__init__(config)
        width = config.inner_dim
        self.before_proj = nn.Linear(width, width) if first else None
        self.after_proj = nn.Linear(width, width)


class ControlBranch(nn.Module):
    """What reads one kind of control map, or several.

    A branch just built gives hints of zero, because its outer projections start at zero: a picture
    is then what it is without the branch.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = control_layers(config)
        self.control_img_in = nn.Linear(control_channels(config), config.inner_dim)
        self.control_transformer_blocks = nn.ModuleList(
            ControlBlock(config, first=layer == 0) for layer in self.layers
        )
        for block in self._blocks():
            for projection in (block.before_proj, block.after_proj):
                if projection is not None:
                    nn.init.zeros_(projection.weight)
                    nn.init.zeros_(projection.bias)

    def copy_blocks(self, denoiser: Transformer) -> None:
        """Starts each block from the denoiser's own block at its place, as training does."""
        for layer, block in zip(self.layers, self._blocks(), strict=True):
            found = block.load_state_dict(
                denoiser.transformer_blocks[layer].state_dict(), strict=False
            )
            assert not found.unexpected_keys

    def forward(
        self,
        context: torch.Tensor,
        image: torch.Tensor,
        text: torch.Tensor,
        image_mod: torch.Tensor,
        text_mod: torch.Tensor,
        rotary: Rotary,
    ) -> list[torch.Tensor]:
        """The hint of each of `layers`, [n, image tokens, width].

        Args:
            context: control tokens, [n, image tokens, control channels].
            image: image tokens as the denoiser embedded them, [n, image tokens, width].
            text: text tokens, likewise.
            image_mod: modulation [n, 6 x width].
            text_mod: likewise.
            rotary: of text tokens and behind them image tokens.
        """
        state = self.control_img_in(context)
        hints: list[torch.Tensor] = []
        for block in self._blocks():
            if block.before_proj is not None:
                state = block.before_proj(state) + image
            state, text = block(state, text, image_mod, text_mod, rotary)
            hints.append(block.after_proj(state))
        return hints

    def _blocks(self) -> list[ControlBlock]:
        return [b for b in self.control_transformer_blocks if isinstance(b, ControlBlock)]
