"""The finished adapter: diffusers' keys, and what it was made of in the metadata."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import torch

from calotype.serving.core.json_object import JsonObject
from calotype.serving.engine.sizing.adapter_origins import Origins
from calotype.serving.training.lora.cache import write_tensors


def write_adapter(
    path: pathlib.Path,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    rank: int,
    alpha: float,
    described: JsonObject,
    origins: Origins,
) -> None:
    """Writes ``transformer.MODULE.lora_A.weight`` and ``lora_B``, in bfloat16.

    Args:
        alpha: a factor of alpha / rank other than 1 is multiplied into B, so that every reader of
            the file applies it alike.
        described: what the metadata entry ``calotype`` says: base and data digests, trigger,
            recipe.
        origins: the pictures that it learnt from, and by what right.

    Raises:
        StorageFailed: it cannot be written.
    """
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"transformer.{name}.lora_A.weight"] = down.to(torch.bfloat16).cpu()
        tensors[f"transformer.{name}.lora_B.weight"] = (
            (up * (alpha / rank)).to(torch.bfloat16).cpu()
        )
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(
            {
                "transformer.r": rank,
                "transformer.lora_alpha": rank,
                "transformer.target_modules": sorted(factors),
            },
            sort_keys=True,
        ),
        "calotype": json.dumps(described, sort_keys=True),
    } | origins.to_metadata()
    write_tensors(path, tensors, metadata)
