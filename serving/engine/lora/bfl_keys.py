"""LoRA layers that are named as Black Forest Labs names FLUX.2's, under diffusers' names.

Their query, key and value are one layer, which is split into three here. Equal to diffusers'
converters of ``diffusion_model.`` and of kohya's files; works on shapes alone as well as on values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_IN_DOUBLE_BLOCKS = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_IN_SINGLE_BLOCKS = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
}
_KOHYA_OUTSIDE = (
    "img_in",
    "txt_in",
    "time_in.in_layer",
    "time_in.out_layer",
    "final_layer.linear",
)
KOHYA_PREFIX = "lora_unet_"
_BLOCK = re.compile(r"(double|single)_blocks[._](\d+)[._](.+)")


@dataclass(frozen=True, slots=True)
class _Factors:
    """``up @ down`` of one layer."""

    down: torch.Tensor
    up: torch.Tensor


def from_bfl(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Keys ``<layer>.lora_A.weight`` and ``.lora_B.weight`` with diffusers' names of layers.

    Returns:
        What is known, and the keys that are not.
    """
    found: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", key)
        names = () if match is None else _diffusers_names(match[1])
        if match is None or not names:
            unknown.append(key)
            continue
        parts = tensor.chunk(len(names)) if match[2] == "lora_B" else [tensor] * len(names)
        for name, part in zip(names, parts, strict=True):
            found[f"{name}.{match[2]}.weight"] = part
    return found, unknown


def from_kohya(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The same of ``lora_unet_<layer>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``.

    Alpha over rank goes into the factors. Where each of query, key and value has ranks of its own
    in a joint layer (the second factor is zero elsewhere), they are taken apart.
    """
    found: dict[str, torch.Tensor] = {}
    left = dict(tensors)
    for key in tensors:
        layer = key.removesuffix(".lora_down.weight")
        names = _kohya_names(layer.removeprefix(KOHYA_PREFIX)) if layer != key else ()
        if not names or f"{layer}.lora_up.weight" not in tensors:
            continue
        factors = _scaled(
            left.pop(key), left.pop(f"{layer}.lora_up.weight"), left.pop(f"{layer}.alpha", None)
        )
        for name, part in zip(names, _split(factors, len(names)), strict=True):
            found[f"{name}.lora_A.weight"] = part.down
            found[f"{name}.lora_B.weight"] = part.up
    return found, list(left)


def _diffusers_names(layer: str) -> tuple[str, ...]:
    """What diffusers calls a layer of Black Forest Labs; three names if it is a joint one."""
    block = _BLOCK.fullmatch(layer)
    if block is None:
        return (_OUTSIDE[layer],) if layer in _OUTSIDE else ()
    return _in_block(block, _IN_DOUBLE_BLOCKS, _IN_SINGLE_BLOCKS)


def _kohya_names(layer: str) -> tuple[str, ...]:
    """The same of a name whose dots are underscores."""
    block = _BLOCK.fullmatch(layer)
    if block is None:
        return tuple(_OUTSIDE[name] for name in _KOHYA_OUTSIDE if name.replace(".", "_") == layer)
    joined = {name.replace(".", "_"): names for name, names in _IN_DOUBLE_BLOCKS.items()}
    return _in_block(block, joined, _IN_SINGLE_BLOCKS)


def _in_block(
    block: re.Match[str],
    double: Mapping[str, tuple[str, ...]],
    single: Mapping[str, tuple[str, ...]],
) -> tuple[str, ...]:
    kind, place, layer = block.groups()
    names = (double if kind == "double" else single).get(layer, ())
    stem = "transformer_blocks" if kind == "double" else "single_transformer_blocks"
    return tuple(f"{stem}.{place}.{name}" for name in names)


def _scaled(down: torch.Tensor, up: torch.Tensor, alpha: torch.Tensor | None) -> _Factors:
    """Alpha over rank in the factors, half of it in each, by powers of two."""
    scale_down = 1.0 if alpha is None else alpha.item() / down.shape[0]
    scale_up = 1.0
    while 0 < scale_down * 2 < scale_up:
        scale_down *= 2
        scale_up /= 2
    return _Factors(down * scale_down, up * scale_up)


def _split(factors: _Factors, count: int) -> list[_Factors]:
    """A joint layer as one layer for each of its equal parts."""
    ups = factors.up.chunk(count)
    rank, rest = divmod(factors.down.shape[0], count)
    if count == 1 or rest or not _separate(ups, rank):
        return [_Factors(factors.down, up) for up in ups]
    return [
        _Factors(down, up[:, place * rank : (place + 1) * rank].contiguous())
        for place, (down, up) in enumerate(zip(factors.down.chunk(count), ups, strict=True))
    ]


def _separate(ups: tuple[torch.Tensor, ...], rank: int) -> bool:
    """Whether each part uses ranks of its own only."""
    return all(
        not bool(other.any())
        for place, up in enumerate(ups)
        for other in (up[:, : place * rank], up[:, (place + 1) * rank :])
    )
