"""LoHa: a change that is the elementwise product of two low-rank matrices (FedPara, 2108.06098).

``(a1 @ b1) * (a2 @ b2)`` is a LoRA whose ranks are the pairs of theirs: column (i, j) of its second
factor is ``a1[:, i] * a2[:, j]``, row (i, j) of its first is ``b1[i] * b2[j]``. Exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from calotype.serving.engine.lora.low_rank import Reduced, reduce_rank


def loha_factors(tensors: Mapping[str, torch.Tensor], most: int) -> Reduced:
    """The product as ``up @ down`` of at most ``most`` ranks."""
    a1, a2 = tensors["hada_w1_a"], tensors["hada_w2_a"]
    b1, b2 = tensors["hada_w1_b"], tensors["hada_w2_b"]
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    if len(down) <= most:
        return Reduced(up, down, 0.0, len(down))
    return reduce_rank(up, down, most)
