"""Matrix products whose rows are the same to the bit, however many there are.

Libraries choose the kernel of a matrix product by its number of rows: one row alone is summed in
another order than beside seven others. So the same image alone and in a batch would part in the
last bit of a float, and in whatever is made of it. From `FEWEST_ROWS` on every row is summed alike;
shorter products are filled up with zeros, which costs next to nothing. Tests hold all of it to
equality.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

FEWEST_ROWS = 16
"""Of a product. On x86 with 1, 2 and 4 threads, 4, 12 and 4 were found to be enough."""


def by_row(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``product(x)``, each row as it is in any other number of rows.

    Args:
        product: of tensors [rows, features].
        x: [..., features].
    """
    rows = x.shape[:-1].numel()
    if rows >= FEWEST_ROWS or not rows:
        return product(x)
    filled = functional.pad(x.reshape(rows, -1), (0, 0, 0, FEWEST_ROWS - rows))
    # A copy, so that the filling is not kept as long as the rows are.
    return product(filled)[:rows].clone().reshape(*x.shape[:-1], -1)


class RowLinear(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return by_row(super().forward, x)


def keep_rows_apart(model: torch.nn.Module) -> None:
    """Makes every linear layer of a model a `RowLinear`, with the weights that it has."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = RowLinear
