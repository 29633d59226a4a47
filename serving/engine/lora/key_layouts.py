"""The spellings of FLUX.2 LoRA files, brought to the one of diffusers.

| written by | keys begin with | names of layers | alpha |
|---|---|---|---|
| diffusers, PEFT | ``transformer.``, ``base_model.model.`` | diffusers' | keys or metadata |
| ai-toolkit, fal, BFL | ``diffusion_model.``, ``base_model.model.`` | BFL's | keys |
| kohya, musubi-tuner | ``lora_unet_`` | BFL's, joined by ``_`` | keys |

BFL is Black Forest Labs.

Nothing is left out in silence. Run first on stand-ins that have the shapes of a file's header but
no memory.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch

from calotype.serving.engine.lora.bfl_keys import KOHYA_PREFIX, from_bfl, from_kohya

logger = logging.getLogger(__name__)

ALPHA = re.compile(r"(.+)\.alpha$")
_DOWN = re.compile(r"(.+)\.(?:lora_A|lora_down)(?:\.default)?\.weight$")
_UP = re.compile(r"(.+)\.(?:lora_B|lora_up)(?:\.default)?\.weight$")
_BFL_NAMES = (
    "double_blocks.",
    "single_blocks.",
    "img_in.",
    "txt_in.",
    "time_in.",
    "guidance_in.",
    "final_layer.",
    "single_stream_modulation.lin.",
    "double_stream_modulation_img.lin.",
    "double_stream_modulation_txt.lin.",
)
_OTHER_KINDS = {
    "dora_scale": "a DoRA adapter",
    "lora_magnitude_vector": "a DoRA adapter",
    "lokr_": "a LoKr adapter",
    "hada_": "a LoHa adapter",
    "oft_": "an OFT adapter",
    "ip_adapter": "an image-prompt adapter",
    "lora_te": "an adapter of the text encoder",
    "text_encoder.": "an adapter of the text encoder",
}
"""Parts of keys of files that are no LoRA of a denoiser."""

GUIDANCE = "time_guidance_embed.guidance_embedder."
"""Layers that some trainers always write, also for models that take no guidance."""


class UnknownKeys(ValueError):
    """A file is not a LoRA of a FLUX.2 denoiser; the text completes "... cannot be used: "."""


def refuse_other_kinds(names: Mapping[str, object]) -> None:
    """Names the kind of a file that is something else than a LoRA.

    Raises:
        UnknownKeys: it is.
    """
    for name in names:
        for part, kind in _OTHER_KINDS.items():
            if part in name:
                raise UnknownKeys(f"it is {kind} ({name}), which is not supported")


def to_diffusers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys in diffusers' form: ``<module>.lora_A.weight``, ``.lora_B.weight`` or ``.alpha``.

    Raises:
        UnknownKeys: keys that no FLUX.2 LoRA has.
    """
    names = {_bare(name): tensor for name, tensor in tensors.items()}
    try:
        if any(name.startswith(KOHYA_PREFIX) for name in names):
            return _from_kohya(names)
        names = {_spelt(name): tensor for name, tensor in names.items()}
        if any(name.startswith(_BFL_NAMES) for name in names):
            return _from_bfl(names)
    except UnknownKeys:
        raise
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError) as fault:
        raise UnknownKeys(f"its keys are not those of a FLUX.2 adapter ({fault})") from fault
    # Some exports cut the first letters of diffusers' names off.
    return {re.sub(r"^sformer_blocks\.", "transformer_blocks.", k): v for k, v in names.items()}


def _bare(name: str) -> str:
    """Without the prefixes that say nothing of the layer."""
    for prefix in ("base_model.model.", "diffusion_model.", "model.", "transformer."):
        name = name.removeprefix(prefix)
    # PEFT writes the adapter's name between "lora_A" and "weight" when it saves a live model.
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


def _spelt(name: str) -> str:
    return name.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")


def _from_kohya(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    converted, left = from_kohya(tensors)
    unknown = sorted(name for name in left if not name.startswith("lora_unet_guidance_in"))
    if unknown:
        raise UnknownKeys(f"it holds the unknown key {unknown[0]!r}")
    if left:
        logger.warning("%d keys of a guidance embedder are left out: %s", len(left), min(left))
    return converted


def _from_bfl(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With BFL's names; those of diffusers in the same file stay as they are."""
    scaled = _with_alpha(tensors)
    theirs = {k: v for k, v in scaled.items() if k.startswith(_BFL_NAMES)}
    rest = {k: v for k, v in scaled.items() if k not in theirs}
    converted, unknown = from_bfl(theirs)
    if unknown:
        raise UnknownKeys(f"it holds the unknown key {unknown[0]!r}")
    return converted | rest


def _with_alpha(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Alphas folded into the second factors, because layers are split into several."""
    found = {k: v for k, v in tensors.items() if not ALPHA.match(k)}
    for name, alpha in tensors.items():
        match = ALPHA.match(name)
        if match is None:
            continue
        down, up = f"{match[1]}.lora_A.weight", f"{match[1]}.lora_B.weight"
        if down not in found or up not in found:
            raise ValueError(f"{name} belongs to no weights")
        if alpha.numel() != 1:
            raise ValueError(f"{name} must be one number")
        found[up] = found[up] * (float(alpha) / found[down].shape[0])
    return found


def without_guidance(
    tensors: Mapping[str, torch.Tensor], modules: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    """Leaves out the layers of a guidance embedder that the model does not have."""
    left_out = {
        name for name in tensors if name.startswith(GUIDANCE) and _module(name) not in modules
    }
    if left_out:
        logger.warning(
            "the model takes no guidance: %d keys are left out, such as %s",
            len(left_out),
            min(left_out),
        )
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}


def _module(name: str) -> str:
    for pattern in (_DOWN, _UP, ALPHA):
        match = pattern.match(name)
        if match is not None:
            return match[1]
    return name
