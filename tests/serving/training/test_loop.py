"""Training goes on after a kill as if nothing had happened."""

from __future__ import annotations

import pathlib

import pytest
import torch
from torch import nn

from calotype.serving.training.loop import Stage


class Killed(Exception):
    """Stands for a kill between two steps."""


def make(work: pathlib.Path, minutes: float) -> tuple[nn.Linear, Stage]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    return model, Stage(
        "line", work, {"model": model}, minutes, lr=0.05, muon_lr=0.01,
        matrices=lambda name, parameter: parameter.ndim == 2, save_seconds=0.0, warmup=1,
    )  # fmt: skip


def test_a_killed_stage_resumes_where_it_was(tmp_path: pathlib.Path) -> None:
    steps: list[int] = []
    model, stage = make(tmp_path, 1.0)

    def loss(generator: torch.Generator) -> torch.Tensor:
        steps.append(stage.done)
        if len(steps) == 20:
            raise Killed
        x = torch.randn(8, 4, generator=generator)
        return (model(x) - 2 * x).square().mean()

    with pytest.raises(Killed):
        stage.run(loss)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    again, resumed = make(tmp_path, 1.0)
    assert resumed.done == 19
    assert 0 < resumed.seconds < 60
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_a_finished_stage_gives_its_averages_and_trains_no_more(tmp_path: pathlib.Path) -> None:
    model, stage = make(tmp_path, 0.005)

    def loss(generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(8, 4, generator=generator)
        return (model(x) - 2 * x).square().mean()

    stage.run(loss)
    assert stage.finished
    again, resumed = make(tmp_path, 0.005)
    assert resumed.finished
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_steps_draw_the_same_numbers_in_every_run(tmp_path: pathlib.Path) -> None:
    _, one = make(tmp_path / "a", 1.0)
    _, other = make(tmp_path / "b", 1.0)
    for step in (0, 7):
        first, second = (torch.rand(4, generator=stage.generator(step)) for stage in (one, other))
        assert torch.equal(first, second)
    assert not torch.equal(
        torch.rand(4, generator=one.generator(0)), torch.rand(4, generator=one.generator(1))
    )
