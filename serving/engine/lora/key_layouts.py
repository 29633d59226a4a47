"""The spellings of FLUX.2 adapter files: which key is which factor of which layer.

| written by | keys begin with | names of layers |
|---|---|---|
| diffusers, SimpleTuner | ``transformer.`` | diffusers' |
| PEFT | ``base_model.model.``, ``transformer.base_model.model.`` | diffusers' |
| OneTrainer | ``transformer.`` and ``lora_down``; earlier ``lora_transformer_`` | diffusers' |
| LyCORIS in SimpleTuner | ``lycoris_`` | diffusers', joined by ``_`` |
| ai-toolkit | ``diffusion_model.`` | BFL's |
| ComfyUI | ``diffusion_model.``, ``model.diffusion_model.`` | either |
| fal | ``base_model.model.`` | BFL's |
| BFL | nothing | BFL's |
| kohya, musubi-tuner | ``lora_unet_`` | BFL's, joined by ``_`` |

BFL is Black Forest Labs. Nothing is left out in silence: every key is known, or the file is
refused. Works on the header alone and imports no torch.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from calotype.serving.core.errors import AdapterLoadFailed
from calotype.serving.engine.lora.adapter_fault import AdapterFault, refused
from calotype.serving.engine.lora.layer_names import Naming, Target, target_of
from calotype.serving.engine.sizing.weight_header import WeightHeader

_PREFIXES = (
    "base_model.model.",
    "model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
_FACTORS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    **{f"lokr_{n}": f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    **{f"hada_{n}": f"hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b")},
}
_KEY = re.compile(r"(?P<layer>.+?)\.(?P<factor>" + "|".join(re.escape(f) for f in _FACTORS) + r")")
# PEFT writes the adapter's name into the key when it saves a live model.
_LIVE = re.compile(r"(\.(?:lora_[AB]|lora_magnitude_vector|(?:lokr|hada)_\w+))\.default(?=\.|$)")
_CONVOLUTIONS = "is an adapter of convolutions, which FLUX.2's denoiser has none of"
_BIASES = "changes biases, which FLUX.2's denoiser has none of"
_TEXT = "holds an adapter of the text encoder; train the denoiser alone"
_OTHER_KINDS = {
    r"b?oft_": "is an OFT adapter",
    r"vera_lambda": "is a VeRA adapter",
    r"on_input|ia3_": "is an (IA)3 adapter",
    r"\.[ab][12]\.weight$": "is a GLoRA adapter",
    r"lora_mid|lokr_t[12]|hada_t[12]": _CONVOLUTIONS,
    r"\.diff(_b)?$": "holds whole weights, not factors",
    r"[wb]_norm": "changes normalisations",
    r"\.bias$": _BIASES,
    r"reshape_weight": "changes the shape of layers, as control adapters of FLUX.1 do",
    r"ip_adapter": "is an image-prompt adapter; give reference images instead",
    r"lora_te|text_encoder|lycoris_te|bundle_emb": _TEXT,
}
"""Parts of keys of files that are no adapter of linear layers of a denoiser."""
_FLUX_1 = re.compile(
    r"(img|txt)_mod[._]lin|modulation[._]lin\b|norm1(_context)?[._]linear|ff(_context)?[._]net[._]"
    r"|vector_in|proj_mlp|single_transformer_blocks[._]\d+[._](proj_out|attn[._]to_[qkv]\b|norm)"
)


class Layout(enum.StrEnum):
    """Whose spelling a file has."""

    DIFFUSERS = "diffusers"
    PEFT = "peft"
    ONETRAINER = "onetrainer"
    LYCORIS = "lycoris"
    AI_TOOLKIT = "ai-toolkit"
    COMFY = "comfy"
    FAL = "fal"
    BFL = "bfl"
    KOHYA = "kohya"
    MUSUBI = "musubi-tuner"
    MIXED = "mixed"


class Kind(enum.StrEnum):
    """How a layer's change is written."""

    LORA = "lora"
    LOKR = "lokr"
    LOHA = "loha"


@dataclass(frozen=True, slots=True)
class LayerKeys:
    """One layer of a file.

    Attributes:
        name: as the file spells it, without prefix.
        keys: what a tensor is ("down", "up", "alpha", "magnitude", "lokr_w1", ...) -> its key.
    """

    name: str
    target: Target
    kind: Kind
    keys: Mapping[str, str]

    @property
    def first_key(self) -> str:
        """The key that messages name."""
        return next(iter(self.keys.values()))


@dataclass(frozen=True, slots=True)
class AdapterKeys:
    """All keys of a file, each of them in its place.

    Attributes:
        musubi: it is of musubi-tuner, whose LoKr of whole factors is scaled by alpha too.
    """

    layout: Layout
    layers: tuple[LayerKeys, ...]
    musubi: bool


@dataclass(slots=True)
class _Found:
    name: str
    target: Target
    keys: dict[str, str] = field(default_factory=dict)


def read_keys(header: WeightHeader) -> AdapterKeys:
    """Sorts the keys of a file.

    Raises:
        AdapterLoadFailed: a key that no FLUX.2 adapter has, one that is missing, or another kind
            of file; names file and key.
    """
    if not header.tensors:
        raise refused(header.path, AdapterFault.KEY_MISSING, "it holds no tensors; export it again")
    found: dict[str, _Found] = {}
    layouts: set[Layout] = set()
    module = header.metadata.get("ss_network_module", "")
    musubi = "musubi" in module or "lora_flux_2" in module or "ss_lokr_factor" in header.metadata
    for key in header.tensors:
        if key == "lokr_factor":  # how musubi-tuner cut the layers, which their shapes say too
            musubi = True
            continue
        name, factor, layout, target = _read_key(header, key)
        if factor not in ("alpha", "magnitude"):  # which several spell alike
            layouts.add(layout)
        # Several spellings of one layer are one layer.
        layer = found.setdefault(name.replace(".", "_"), _Found(name, target))
        if factor in layer.keys:
            raise refused(
                header.path,
                AdapterFault.UNKNOWN_KEY,
                f"{key!r} and {layer.keys[factor]!r} are the same weights of {name}; keep one",
                key,
            )
        layer.keys[factor] = key
    layers = tuple(_whole(header, layer) for layer in found.values())
    _check_once(header, layers)
    layout = layouts.pop() if len(layouts) == 1 else Layout.MIXED
    if layout is Layout.KOHYA and musubi:
        layout = Layout.MUSUBI
    return AdapterKeys(layout, layers, musubi)


def _read_key(header: WeightHeader, key: str) -> tuple[str, str, Layout, Target]:
    plain, prefix = _LIVE.sub(r"\1", key), ""
    while begin := next((p for p in _PREFIXES if plain.startswith(p)), ""):
        plain, prefix = plain.removeprefix(begin), prefix + begin
    match = _KEY.fullmatch(plain)
    target = target_of(match["layer"]) if match is not None else None
    if match is None or target is None:
        raise _unknown(header, key, match["layer"] if match is not None else None)
    spelling = match["factor"]
    layout = _layout(prefix, target.naming, spelling)
    return match["layer"], _FACTORS[spelling], layout, target


def _layout(prefix: str, naming: Naming, factor: str) -> Layout:
    old_words = "lora_down" in factor or "lora_up" in factor
    if "lora_transformer_" in prefix or (prefix == "transformer." and old_words):
        return Layout.ONETRAINER
    if "lora_unet_" in prefix:
        return Layout.KOHYA
    if "lycoris_" in prefix:
        return Layout.LYCORIS
    if naming == "diffusers":
        if "diffusion_model." in prefix:
            return Layout.COMFY
        return Layout.PEFT if "base_model.model." in prefix else Layout.DIFFUSERS
    if "base_model.model." in prefix:
        return Layout.FAL
    if prefix == "model.diffusion_model.":
        return Layout.COMFY
    return Layout.AI_TOOLKIT if "diffusion_model." in prefix else Layout.BFL


def _unknown(header: WeightHeader, key: str, layer: str | None) -> AdapterLoadFailed:
    for part, kind in _OTHER_KINDS.items():
        if re.search(part, key):
            return refused(
                header.path,
                AdapterFault.UNSUPPORTED_KIND,
                f"it {kind} ({key!r}), and only LoRA, DoRA, LoKr and LoHa are read",
                key,
            )
    if _FLUX_1.search(key):
        return refused(
            header.path,
            AdapterFault.WRONG_BASE,
            f"it was made for another model, FLUX.1, as {key!r} shows; train it again on FLUX.2",
            key,
        )
    if layer is not None:
        return refused(
            header.path,
            AdapterFault.WRONG_BASE,
            f"it was made for another model: FLUX.2 has no linear layer {layer!r} (key {key!r}); "
            "use an adapter of FLUX.2",
            key,
        )
    return refused(
        header.path,
        AdapterFault.UNKNOWN_KEY,
        f"it holds the unknown key {key!r}; export it in diffusers' layout, or remove the key",
        key,
    )


def _whole(header: WeightHeader, found: _Found) -> LayerKeys:
    """The layer, with every factor that its kind needs and none of another kind."""
    name, keys = found.name, found.keys
    factors = {factor for factor in keys if factor not in ("alpha", "magnitude")}
    first = next(iter(keys.values()))
    if not factors:
        raise refused(
            header.path,
            AdapterFault.KEY_MISSING,
            f"{first} belongs to no weights; export the file again",
            first,
        )
    if factors & {"down", "up"}:
        kind, needed = Kind.LORA, {"down", "up"}
    elif any(factor.startswith("lokr_") for factor in factors):
        kind, needed = Kind.LOKR, set()
        for side in ("lokr_w1", "lokr_w2"):
            needed |= {side} if side in factors else {f"{side}_a", f"{side}_b"}
    else:
        kind, needed = Kind.LOHA, {f"hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b")}
    for factor in sorted(needed - factors):
        raise refused(
            header.path,
            AdapterFault.KEY_MISSING,
            f"{name} has {first!r}, but its {_SPELT.get(factor, factor)} is missing: export the "
            "file again",
            first,
        )
    for factor in sorted(factors - needed):
        raise refused(
            header.path,
            AdapterFault.UNKNOWN_KEY,
            f"{keys[factor]!r} is of another kind than the layer's other weights; keep one kind",
            keys[factor],
        )
    return LayerKeys(name, found.target, kind, keys)


_SPELT = {"down": "lora_A (lora_down)", "up": "lora_B (lora_up)"}


def _check_once(header: WeightHeader, layers: tuple[LayerKeys, ...]) -> None:
    seen: dict[str, str] = {}
    for layer in layers:
        key = layer.first_key
        for module in layer.target.modules:
            if module in seen:
                raise refused(
                    header.path,
                    AdapterFault.UNKNOWN_KEY,
                    f"{key!r} and {seen[module]!r} both change {module}; keep one",
                    key,
                )
            seen[module] = key
