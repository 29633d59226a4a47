"""The names of FLUX.2's linear layers, as diffusers and as Black Forest Labs (BFL) call them.

Trainers write either, with dots or with underscores. A joint layer of BFL (query, key and value in
one) stands for three of diffusers'. Pure strings; imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Naming = Literal["diffusers", "bfl"]

_BFL_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
_BFL_SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
_BFL_OUTSIDE = {
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
_FUSED = {
    "attn.to_qkv": _BFL_DOUBLE["img_attn.qkv"],
    "attn.to_added_qkv": _BFL_DOUBLE["txt_attn.qkv"],
}
"""Diffusers' own joint layers (`fuse_qkv_projections`)."""

HALVES_SWAPPED = "norm_out.linear"
"""BFL's last modulation gives shift, then scale; diffusers' gives scale, then shift. Diffusers'
converter of the model (`convert_flux2_transformer_checkpoint_to_diffusers`) exchanges them, its
converter of adapters (0.42) does not."""

GUIDANCE = "time_guidance_embed.guidance_embedder."
"""Layers that some trainers always write, also for models that take no guidance."""

_BLOCK = re.compile(
    r"(?P<kind>double_blocks|single_blocks|single_transformer_blocks|transformer_blocks"
    r"|sformer_blocks)[._](?P<place>\d+)[._](?P<layer>.+)"
)
# Some exports cut the first letters of diffusers' names off.
_STEMS = {
    "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
    "transformer_blocks": "transformer_blocks",
    "single_transformer_blocks": "single_transformer_blocks",
    "sformer_blocks": "transformer_blocks",
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a layer of a file stands for.

    Attributes:
        modules: diffusers' names; of a joint layer several, from its first rows to its last.
        naming: whose name it is.
        halves_swapped: the halves of its rows are the other way round in diffusers' layer.
    """

    modules: tuple[str, ...]
    naming: Naming
    halves_swapped: bool = False


def _both(names: dict[str, Target]) -> dict[str, Target]:
    """Names with dots, and with underscores for them."""
    return {name.replace(".", "_"): target for name, target in names.items()} | names


def _table(bfl: Mapping[str, tuple[str, ...]], fused: bool = False) -> dict[str, Target]:
    found = {name: Target(modules, "bfl") for name, modules in bfl.items()}
    for modules in bfl.values():
        found |= {module: Target((module,), "diffusers") for module in modules}
    if fused:
        found |= {name: Target(modules, "diffusers") for name, modules in _FUSED.items()}
    return _both(found)


_DOUBLE, _SINGLE = _table(_BFL_DOUBLE, fused=True), _table(_BFL_SINGLE)
_OUTSIDE = _both(
    {
        name: Target((module,), "bfl", halves_swapped=module == HALVES_SWAPPED)
        for name, module in _BFL_OUTSIDE.items()
    }
    | {module: Target((module,), "diffusers") for module in _BFL_OUTSIDE.values()}
)


def target_of(layer: str) -> Target | None:
    """The layers of diffusers that a name without prefix stands for; None if FLUX.2 has no such."""
    block = _BLOCK.fullmatch(layer)
    if block is None:
        return _OUTSIDE.get(layer)
    stem = _STEMS[block["kind"]]
    found = (_DOUBLE if stem == "transformer_blocks" else _SINGLE).get(block["layer"])
    if found is None:
        return None
    modules = tuple(f"{stem}.{int(block['place'])}.{name}" for name in found.modules)
    return Target(modules, found.naming)


_BFL_OF = {
    module: (name, place, modules)
    for names in (_BFL_DOUBLE, _BFL_SINGLE)
    for name, modules in names.items()
    for place, module in enumerate(modules)
}
_BFL_OUTSIDE_OF = {module: name for name, module in _BFL_OUTSIDE.items()}
_BFL_STEMS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}


def bfl_layer(module: str) -> tuple[str, Target]:
    """The layer of BFL that a module of diffusers is, or is a part of.

    Raises:
        KeyError: it is no linear layer of FLUX.2.
    """
    if module in _BFL_OUTSIDE_OF:
        name = _BFL_OUTSIDE_OF[module]
        return name, _OUTSIDE[name]
    stem, place, layer = module.split(".", 2)
    name, _, modules = _BFL_OF[layer]
    whole = tuple(f"{stem}.{place}.{part}" for part in modules)
    return f"{_BFL_STEMS[stem]}.{place}.{name}", Target(whole, "bfl")


def block_of(module: str) -> str:
    """The block that a module of diffusers is in, such as ``transformer_blocks.3``."""
    stem, _, rest = module.partition(".")
    if stem in _BFL_STEMS:
        return f"{stem}.{rest.partition('.')[0]}"
    return "outside the blocks"
