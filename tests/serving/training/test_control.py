"""The embedded control branch: its maps, its judge, its training, and the file that ships."""

from __future__ import annotations

import dataclasses
import pathlib
import random

import numpy as np
import pytest
import torch

from calotype.serving.engine.control.branch import ControlBranch
from calotype.serving.engine.control.control_file import read_branch
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.model.components import Components, load_components
from calotype.serving.training.control.__main__ import BRANCH
from calotype.serving.training.control.branch import ControlFlow, fill_pools, write_branch
from calotype.serving.training.control.evaluation import NAME, draw, held_out
from calotype.serving.training.control.layouts import (
    KINDS,
    Layout,
    Placed,
    control_map,
    picture,
    sample_layout,
)
from calotype.serving.training.control.obedience import obedience
from calotype.serving.training.scenes import to_uint8
from calotype.serving.training.shapes import PACKAGED


@pytest.fixture(scope="module")
def model() -> Components:
    torch.set_num_threads(1)
    return load_components(PACKAGED)


def drawn(layout: Layout) -> np.ndarray:
    return to_uint8(picture(layout).unsqueeze(0))[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_exact_pictures_obey_and_displaced_ones_do_not(kind: str) -> None:
    rng = random.Random(kind)
    for anywhere in (0.0, 1.0):
        layout = sample_layout(rng, True, kind, anywhere=anywhere)
        assert obedience(layout, drawn(layout))["full"]
        first = layout.things[0]
        aside = 12 if first.x < 64 else -12
        moved = dataclasses.replace(first, x=first.x + aside)
        wrong = dataclasses.replace(layout, things=(moved, *layout.things[1:]))
        found = obedience(layout, drawn(wrong))
        assert not found["place"] and not found["obeyed"]


def test_maps_show_what_their_picture_shows() -> None:
    layout = Layout("blue", (Placed("circle", "red", 40.0, 80.0, 24.0),), "a red circle")
    inside = (drawn(layout)[:, :, 0] > 150).nonzero()
    for kind in KINDS:
        rows, columns = (control_map(layout, kind).amax(0) > -0.9).numpy().nonzero()
        for found, wanted in ((rows, inside[0]), (columns, inside[1])):
            assert abs(int(found.min()) - int(wanted.min())) <= 3
            assert abs(int(found.max()) - int(wanted.max())) <= 3


def test_a_few_steps_lower_the_loss_and_the_file_loads_strictly(
    model: Components, tmp_path: pathlib.Path
) -> None:
    torch.manual_seed(0)
    branch = ControlBranch(model.denoiser.config)
    branch.copy_blocks(model.denoiser)
    pool = fill_pools(model, 8)[:1]
    flow = ControlFlow(model, branch, pool, 8)
    optimizer = torch.optim.AdamW(branch.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = flow.loss(torch.Generator().manual_seed(1))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(p.grad is None for p in model.denoiser.parameters())
    write_branch(branch, tmp_path / "b.safetensors")
    again = read_branch(tmp_path / "b.safetensors", model.denoiser.config, dtype=torch.float32)
    assert again.layers == (0,)


def test_the_file_that_ships_changes_pictures_and_is_small(model: Components) -> None:
    assert BRANCH.stat().st_size <= 3_000_000
    engine = Engine(model)
    engine.controls.load(NAME, BRANCH, wait=60)
    cases = held_out(2, 1, 0.0)
    followed, plain = draw(engine, cases, steps=6), draw(engine, cases, steps=6, scale=0)
    for a, b in zip(followed, plain, strict=True):
        assert np.abs(a.astype(float) - b).mean() > 0.5
