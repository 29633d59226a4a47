"""The decoder-only language models of FLUX.2's text encoders, in plain PyTorch.

Equal to transformers' MistralModel (the text half of Mistral-Small-3.2, FLUX.2 [dev]) and
Qwen3Model (FLUX.2 [klein]), whose weights it reads. It exists because importing transformers' model
code takes several times as long, and as much memory, as all the rest of a text encoder's process; a
test holds it to transformers. It computes the hidden states up to the last layer that is read, and
nothing after that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from calotype.serving.engine.sizing.configs import TextModelConfig


class TextModel(nn.Module):
    """Token ids to hidden states. Parameter names are those of transformers.

    Args:
        last_layer: the highest hidden state that will be read; 0 is the token embedding.
    """

    def __init__(self, config: TextModelConfig, last_layer: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(last_layer))
        # Only the output of the whole model's last layer is normalised.
        whole = last_layer == config.layers
        self.norm = RMSNorm(config.hidden_size, config.eps) if whole else nn.Identity()

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states 0 to ``last_layer``, each [n, length, hidden_size].

        Args:
            ids: int64 [n, length].
            mask: [n, length], 0 for padding.
        """
        hidden = self.embed_tokens(ids)
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        allowed = causal & mask.bool()[:, None, None, :]
        rotation = self._rotation(length, hidden)
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, allowed, rotation)
            states.append(hidden)
        states[-1] = self.norm(hidden)
        return states

    def _rotation(self, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.int64, device=like.device)
        frequencies = 1.0 / (self.config.rope_theta ** (half.float() / self.config.head_dim))
        angles = torch.arange(length, device=like.device).float()[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class _Layer(nn.Module):
    def __init__(self, config: TextModelConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _GatedMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.eps)

    def forward(
        self, x: torch.Tensor, allowed: torch.Tensor, rotation: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), allowed, rotation)
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Attention(nn.Module):
    def __init__(self, config: TextModelConfig) -> None:
        super().__init__()
        size, heads, shared = config.head_dim, config.heads, config.key_value_heads
        self.head_dim = size
        self.groups = heads // shared
        self.q_proj = nn.Linear(config.hidden_size, heads * size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, shared * size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, shared * size, bias=False)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(size, config.eps) if config.head_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.eps) if config.head_norm else nn.Identity()

    def forward(
        self, x: torch.Tensor, allowed: torch.Tensor, rotation: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        value = self.v_proj(x).view(shape).transpose(1, 2)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        # Each head of key and value serves a group of query heads.
        key = key.repeat_interleave(self.groups, dim=1)
        value = value.repeat_interleave(self.groups, dim=1)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        joined: torch.Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return joined


class _GatedMLP(nn.Module):
    def __init__(self, config: TextModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def _rotate(x: torch.Tensor, rotation: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864), halves side by side as in GPT-NeoX."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine
