"""FLUX.2's variational autoencoder in plain PyTorch: pixels to latents and back.

Equal to diffusers' AutoencoderKLFlux2, whose parameter names and ``config.json`` it reads; why it
exists is said in `transformer`. It computes what the engine reads: the mean of the latents, and
pixels, whole or in overlapping tiles. Tests hold it to diffusers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from calotype.serving.engine.sizing.configs import AutoencoderConfig

_EPS = 1e-6
_TILE_OVERLAP = 0.25
_DOWN_BLOCK, _UP_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"


class Autoencoder(nn.Module):
    """Encoder and decoder, with diffusers' parameter names.

    Raises:
        TypeError, ValueError, RuntimeError, ZeroDivisionError: the sizes describe no model.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None
        patch = config.patch_size[0] * config.patch_size[1]
        self.bn = _LatentStatistics(patch * latent)

    def encode(self, pixels: torch.Tensor, *, tiled: bool = False) -> torch.Tensor:
        """Mean latents [n, latent channels, h / 8, w / 8] of pixels [n, 3, h, w] in -1..1."""
        side = self.config.tile_side
        if tiled and max(pixels.shape[-2:]) > side:
            moments = _in_tiles(self._encoded, pixels, side, self._tile_latents)
        else:
            moments = self._encoded(pixels)
        return moments.chunk(2, dim=1)[0]

    def decode(self, latents: torch.Tensor, *, tiled: bool = False) -> torch.Tensor:
        """Pixels [n, 3, h, w], about -1..1, of latents [n, latent channels, h / 8, w / 8]."""
        if tiled and max(latents.shape[-2:]) > self._tile_latents:
            return _in_tiles(self._decoded, latents, self._tile_latents, self.config.tile_side)
        return self._decoded(latents)

    @property
    def _tile_latents(self) -> int:
        return self.config.tile_side // self.config.pixels_per_latent

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        moments: torch.Tensor = self.encoder(pixels)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        pixels: torch.Tensor = self.decoder(latents)
        return pixels


class _LatentStatistics(nn.Module):
    """Mean and variance by which patchified latents are normalised: the state of a batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.running_mean: torch.Tensor
        self.running_var: torch.Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))


def _in_tiles(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, side: int, out_side: int
) -> torch.Tensor:
    """``run(x)`` in overlapping tiles that fade into each other.

    Args:
        side: of a tile of ``x``.
        out_side: of what ``run`` makes of a tile.
    """
    stride = int(side * (1 - _TILE_OVERLAP))
    overlap = int(out_side * _TILE_OVERLAP)
    kept = out_side - overlap
    rows: list[list[torch.Tensor]] = []
    for top in range(0, x.shape[2], stride):
        tiles = []
        for left in range(0, x.shape[3], stride):
            tiles.append(run(x[:, :, top : top + side, left : left + side]))
            if rows:
                _fade(rows[-1][len(tiles) - 1], tiles[-1], overlap, dim=2)
            if len(tiles) > 1:
                _fade(tiles[-2], tiles[-1], overlap, dim=3)
        rows.append(tiles)
    return torch.cat(
        [torch.cat([tile[:, :, :kept, :kept] for tile in row], dim=3) for row in rows], dim=2
    )


def _fade(before: torch.Tensor, after: torch.Tensor, overlap: int, dim: int) -> None:
    """Blends the end of one tile into the start of the next, in place."""
    length = min(before.shape[dim], after.shape[dim], overlap)
    for place in range(length):
        old = before.select(dim, before.shape[dim] - length + place)
        new = after.select(dim, place)
        new.copy_(old * (1 - place / length) + new * (place / length))


class _ResnetBlock(nn.Module):
    def __init__(self, given: int, made: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, given, eps=_EPS)
        self.conv1 = nn.Conv2d(given, made, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, made, eps=_EPS)
        self.conv2 = nn.Conv2d(made, made, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(given, made, 1) if given != made else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        out: torch.Tensor = x + hidden
        return out


class _Downsampler(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(functional.pad(x, (0, 1, 0, 1)))
        return out


class _Upsampler(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # torch's upsampling of channels-last tensors fails with 64 rows, and from 2**31 elements
        # on (pytorch issue 141831).
        if x.shape[0] >= 64 or 2 * x.numel() > 2**31:
            x = x.contiguous()
        out: torch.Tensor = self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class _DownBlock(nn.Module):
    def __init__(self, given: int, made: int, config: AutoencoderConfig, last: bool) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList(
            _ResnetBlock(made if i else given, made, groups) for i in range(config.layers_per_block)
        )
        self.downsamplers = nn.ModuleList([] if last else [_Downsampler(made)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class _UpBlock(nn.Module):
    def __init__(self, given: int, made: int, config: AutoencoderConfig, last: bool) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList(
            _ResnetBlock(made if i else given, made, groups)
            for i in range(config.layers_per_block + 1)
        )
        self.upsamplers = nn.ModuleList([] if last else [_Upsampler(made)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class _Attention(nn.Module):
    """Attention of one head over all places."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # A list of one, because diffusers has a dropout behind it: the key is "to_out.0".
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, channels, height, width = x.shape
        places = x.view(n, channels, height * width).transpose(1, 2)
        places = self.group_norm(places.transpose(1, 2)).transpose(1, 2)
        query, key, value = (
            layer(places).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v)
        )
        seen = functional.scaled_dot_product_attention(query, key, value).squeeze(1)
        out: torch.Tensor = self.to_out[0](seen)
        return x + out.transpose(-1, -2).reshape(n, channels, height, width)


class _MidBlock(nn.Module):
    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.attentions = nn.ModuleList(
            [_Attention(channels, groups)] if config.mid_block_add_attention else []
        )
        self.resnets = nn.ModuleList(_ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _DownBlock(channels[max(i - 1, 0)], channels[i], config, i == len(channels) - 1)
            for i in range(len(config.down_block_types))
        )
        self.mid_block = _MidBlock(channels[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(pixels)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        out: torch.Tensor = self.conv_out(functional.silu(self.conv_norm_out(x)))
        return out


class _Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = (config.decoder_block_out_channels or config.block_out_channels)[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            _UpBlock(channels[max(i - 1, 0)], channels[i], config, i == len(channels) - 1)
            for i in range(len(config.up_block_types))
        )
        self.mid_block = _MidBlock(channels[0], config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(latents)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        out: torch.Tensor = self.conv_out(functional.silu(self.conv_norm_out(x)))
        return out
