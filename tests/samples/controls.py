"""Control branches with random weights, and maps for them."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from calotype.serving.engine.control.branch import ControlBranch
from calotype.serving.engine.model.row_linear import keep_rows_apart


def random_branch(config, seed=0):
    """A branch whose hints are of about the size of the tokens."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        branch = ControlBranch(config)
        for parameter in branch.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    keep_rows_apart(branch)
    return branch.eval().requires_grad_(False)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def map_of(width=64, height=64, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return png(np.kron(coarse, np.ones((16, 16, 1), np.uint8)))
