"""LoKr: a change that is the Kronecker product of two small matrices (LyCORIS, arXiv 2309.14859).

``kron(u1 @ v1, u2 @ v2) == kron(u1, u2) @ kron(v1, v2)``: with factors of the two the product is a
LoRA of the product of their ranks, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from calotype.serving.engine.lora.low_rank import Reduced, lost


def lokr_factors(tensors: Mapping[str, torch.Tensor], most: int) -> Reduced:
    """The product as ``up @ down`` of at most ``most`` ranks, best by the singular values.

    The singular values of a Kronecker product are the products of those of its factors, and so are
    the vectors: nothing of the layer's size is decomposed.
    """
    u1, s1, v1 = torch.linalg.svd(_matrix(tensors, "lokr_w1"), full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(_matrix(tensors, "lokr_w2"), full_matrices=False)
    values, order = torch.outer(s1, s2).flatten().sort(descending=True)
    loss, needed = lost(values, most)
    kept = order[: min(most, needed)]
    first, second = kept // len(s2), kept % len(s2)
    root = values[: len(kept)].sqrt()
    # Column k of up is kron(u1[:, first[k]], u2[:, second[k]]).
    up = (u1[:, first][:, None] * u2[:, second][None]).flatten(0, 1) * root
    down = (v1[first][:, :, None] * v2[second][:, None]).flatten(1) * root[:, None]
    return Reduced(up.float(), down.float(), loss, needed)


def _matrix(tensors: Mapping[str, torch.Tensor], side: str) -> torch.Tensor:
    whole = tensors.get(side)
    if whole is not None:
        return whole.double()
    return tensors[f"{side}_a"].double() @ tensors[f"{side}_b"].double()
