"""Branches with random weights on the tiny model."""

from __future__ import annotations

import pytest
from samples.controls import map_of, random_branch

from calotype.serving.engine.control.branch import ControlBranch
from calotype.serving.engine.control.control_store import ControlStore


@pytest.fixture(scope="module")
def controls(components):
    """Two branches, "lines" and "depths", and "fresh", which was never trained."""
    store = ControlStore(components.denoiser)
    store.put("lines", random_branch(components.denoiser.config, 1))
    store.put("depths", random_branch(components.denoiser.config, 2))
    fresh = ControlBranch(components.denoiser.config).eval().requires_grad_(False)
    fresh.copy_blocks(components.denoiser)
    store.put("fresh", fresh)
    return store


@pytest.fixture(scope="module")
def files():
    return {"a": map_of(seed=1), "b": map_of(seed=2), "wide": map_of(96, 64, seed=3)}
