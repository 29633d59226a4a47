"""FLUX.2's denoising transformer in plain PyTorch.

Equal to diffusers' Flux2Transformer2DModel, whose parameter names and ``config.json`` it reads.
Importing diffusers' class takes 10 to 28 s of CPU and 300 MB, which a generator process never
uses. The modules are here; `execution.forward` runs them in order. Tests hold it to diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from calotype.serving.engine.sizing.configs import TransformerConfig

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, each float32 [tokens, head width]."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention of query, key and value, each [n, tokens, heads, head width]."""

_TIME_PERIOD = 10_000.0


class Transformer(nn.Module):
    """The modules of the denoiser, with diffusers' parameter names.

    Raises:
        TypeError, ValueError, RuntimeError, ZeroDivisionError: the sizes describe no model.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = self.inner_dim = config.inner_dim
        self.time_guidance_embed = _TimeGuidanceEmbedding(config)
        self.double_stream_modulation_img = _Modulation(width, 2)
        self.double_stream_modulation_txt = _Modulation(width, 2)
        self.single_stream_modulation = _Modulation(width, 1)
        self.x_embedder = nn.Linear(config.in_channels, width, bias=False)
        self.context_embedder = nn.Linear(config.joint_attention_dim, width, bias=False)
        self.transformer_blocks = nn.ModuleList(
            DoubleStreamBlock(config) for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.num_single_layers)
        )
        self.norm_out = _OutputNorm(config)
        out = config.patch_size**2 * (config.out_channels or config.in_channels)
        self.proj_out = nn.Linear(width, out, bias=False)

    def rotary(self, ids: torch.Tensor) -> Rotary:
        """Rotary tables of positions, int64 [tokens, 4]."""
        # Apple's GPUs have no float64.
        dtype = torch.float32 if ids.device.type == "mps" else torch.float64
        cosines, sines = [], []
        for axis, dim in enumerate(self.config.axes_dims_rope):
            powers = torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim
            angles = torch.outer(ids[:, axis].float(), 1.0 / (self.config.rope_theta**powers))
            cosines.append(angles.cos().repeat_interleave(2, dim=1).float())
            sines.append(angles.sin().repeat_interleave(2, dim=1).float())
        return torch.cat(cosines, dim=-1), torch.cat(sines, dim=-1)

    def replace_attention(self, attend: Attend) -> None:
        """Makes every block attend with a function of the caller's."""
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            block.attn.attend = attend


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention of [n, tokens, heads, head width]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def weighted_attend(bias: torch.Tensor) -> Attend:
    """`attend` with a bias on each key, [keys]: log(2) makes it count twice."""

    def attend_with(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        mask = bias.to(query.dtype).expand(*query.shape[:3], -1)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2)

    return attend_with


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turns neighbouring pairs of channels of [n, tokens, heads, head width] by their angles."""
    cosine, sine = (table[None, :, None, :] for table in rotary)
    if x.requires_grad:
        turned: torch.Tensor = _Rotation.apply(x, cosine, sine)
        return turned
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    across = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cosine + across.float() * sine).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """`rotate` for training: one complex product forward, and one backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> torch.Tensor:
        turn = torch.complex(cosine[..., ::2], sine[..., ::2])
        ctx.save_for_backward(turn)
        return _turned(x, turn)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (turn,) = ctx.saved_tensors
        return _turned(gradients[0], turn.conj().resolve_conj()), None, None


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(3).to(x.dtype)


def _in_heads(x: torch.Tensor, head: int) -> torch.Tensor:
    """[n, tokens, width] as [n, tokens, heads, head width]; there may be no tokens at all."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // head, head)


class _TimestepEmbedding(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width, bias=False)
        self.linear_2 = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_2(functional.silu(self.linear_1(x)))
        return out


class _TimeGuidanceEmbedding(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._channels = config.timestep_guidance_channels
        self.timestep_embedder = _TimestepEmbedding(self._channels, config.inner_dim)
        self.guidance_embedder = (
            _TimestepEmbedding(self._channels, config.inner_dim) if config.guidance_embeds else None
        )

    def forward(self, timestep: torch.Tensor, guidance: torch.Tensor | None) -> torch.Tensor:
        """[n, width] of noise levels and guidance scales in thousandths, both [n]."""
        out: torch.Tensor = self.timestep_embedder(self._sinusoidal(timestep))
        if guidance is not None and self.guidance_embedder is not None:
            out = out + self.guidance_embedder(self._sinusoidal(guidance))
        return out

    def _sinusoidal(self, values: torch.Tensor) -> torch.Tensor:
        half = self._channels // 2
        exponent = -math.log(_TIME_PERIOD) * torch.arange(
            half, dtype=torch.float32, device=values.device
        )
        angles = values[:, None].float() * torch.exp(exponent / half)[None, :]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return functional.pad(waves, (0, self._channels % 2)).to(values.dtype)


class _Modulation(nn.Module):
    """Shift, scale and gate of each of some sub-blocks, from the time embedding."""

    def __init__(self, width: int, sets: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3 * sets * width, bias=False)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(functional.silu(time))
        return out


def _modulated(
    x: torch.Tensor, eps: float, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    return (1 + scale) * functional.layer_norm(x, x.shape[-1:], eps=eps) + shift


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, value = x.chunk(2, dim=-1)
    return functional.silu(gate) * value


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(width, 2 * hidden, bias=False)
        self.linear_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_out(_swiglu(self.linear_in(x)))
        return out


class _JointAttention(nn.Module):
    """Attention over text and image tokens, which have projections of their own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, head = config.inner_dim, config.attention_head_dim
        self.attend: Attend = attend
        self._head = head
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.norm_q = nn.RMSNorm(head, eps=config.eps)
        self.norm_k = nn.RMSNorm(head, eps=config.eps)
        # A list of one, because diffusers has a dropout behind it: the key is "to_out.0".
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.norm_added_q = nn.RMSNorm(head, eps=config.eps)
        self.norm_added_k = nn.RMSNorm(head, eps=config.eps)
        self.add_q_proj = nn.Linear(width, width, bias=False)
        self.add_k_proj = nn.Linear(width, width, bias=False)
        self.add_v_proj = nn.Linear(width, width, bias=False)
        self.to_add_out = nn.Linear(width, width, bias=False)

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query = self.norm_q(_in_heads(self.to_q(image), self._head))
        key = self.norm_k(_in_heads(self.to_k(image), self._head))
        value = _in_heads(self.to_v(image), self._head)
        text_query = self.norm_added_q(_in_heads(self.add_q_proj(text), self._head))
        text_key = self.norm_added_k(_in_heads(self.add_k_proj(text), self._head))
        text_value = _in_heads(self.add_v_proj(text), self._head)
        out = self.attend(
            rotate(torch.cat([text_query, query], dim=1), rotary),
            rotate(torch.cat([text_key, key], dim=1), rotary),
            torch.cat([text_value, value], dim=1),
        ).flatten(2)
        # Split and not sliced: the gradient of slices is filled up with zeros one by one.
        lengths = [text.shape[1], image.shape[1]]
        of_text, of_image = torch.split(out, lengths, dim=1)
        return self.to_out[0](of_image), self.to_add_out(of_text)


class _ParallelAttention(nn.Module):
    """Attention and MLP side by side, with common projections in and out."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, hidden = config.inner_dim, int(config.inner_dim * config.mlp_ratio)
        self.attend: Attend = attend
        self._head, self._width = config.attention_head_dim, width
        self.to_qkv_mlp_proj = nn.Linear(width, 3 * width + 2 * hidden, bias=False)
        self.norm_q = nn.RMSNorm(self._head, eps=config.eps)
        self.norm_k = nn.RMSNorm(self._head, eps=config.eps)
        self.to_out = nn.Linear(width + hidden, width, bias=False)

    def forward(self, x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        whole = self.to_qkv_mlp_proj(x)
        attended, gated = whole.split([3 * self._width, whole.shape[-1] - 3 * self._width], dim=-1)
        query, key, value = (_in_heads(part, self._head) for part in attended.chunk(3, dim=-1))
        query, key = rotate(self.norm_q(query), rotary), rotate(self.norm_k(key), rotary)
        seen = self.attend(query, key, value).flatten(2)
        out: torch.Tensor = self.to_out(torch.cat([seen, _swiglu(gated)], dim=-1))
        return out


class DoubleStreamBlock(nn.Module):
    """A block in which image and text tokens have weights of their own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, hidden = config.inner_dim, int(config.inner_dim * config.mlp_ratio)
        self._eps = config.eps
        self.attn = _JointAttention(config)
        self.ff = _FeedForward(width, hidden)
        self.ff_context = _FeedForward(width, hidden)

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        image_mod: torch.Tensor,
        text_mod: torch.Tensor,
        rotary: Rotary,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and text after the block.

        Args:
            image: [n, image tokens, width].
            text: [n, text tokens, width].
            image_mod: modulation [n, 6 x width].
            text_mod: likewise.
            rotary: of text tokens and behind them image tokens.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = image_mod.unsqueeze(1).chunk(6, -1)
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = text_mod.unsqueeze(
            1
        ).chunk(6, -1)
        image_seen, text_seen = self.attn(
            _modulated(image, self._eps, scale, shift),
            _modulated(text, self._eps, t_scale, t_shift),
            rotary,
        )
        image = image + gate * image_seen
        image = image + mlp_gate * self.ff(_modulated(image, self._eps, mlp_scale, mlp_shift))
        text = text + t_gate * text_seen
        text = text + t_mlp_gate * self.ff_context(
            _modulated(text, self._eps, t_mlp_scale, t_mlp_shift)
        )
        return image, text


class SingleStreamBlock(nn.Module):
    """A block in which text and image tokens share the weights."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._eps = config.eps
        self.attn = _ParallelAttention(config)

    def forward(self, joint: torch.Tensor, mod: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """[n, text and image tokens, width] after the block; ``mod`` is [n, 3 x width]."""
        shift, scale, gate = mod.unsqueeze(1).chunk(3, -1)
        return cast(
            torch.Tensor,
            joint + gate * self.attn(_modulated(joint, self._eps, scale, shift), rotary),
        )


class _OutputNorm(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._eps = config.eps
        self.linear = nn.Linear(config.inner_dim, 2 * config.inner_dim, bias=False)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.linear(functional.silu(time).to(x.dtype)).unsqueeze(1).chunk(2, -1)
        return _modulated(x, self._eps, scale, shift)
