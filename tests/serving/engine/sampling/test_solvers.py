"""Solvers step as the diffusers schedulers of the same method, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calotype.serving.engine.model.noise_schedule import ScheduleConfig
from calotype.serving.engine.sampling import solvers

pytestmark = pytest.mark.slow


def heun(sigmas):
    from diffusers import FlowMatchHeunDiscreteScheduler

    levels = torch.tensor(sigmas)
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(len(sigmas) - 1)
    inner = levels[1:-1].repeat_interleave(2)
    scheduler.sigmas = torch.cat([levels[:1], inner, levels[-1:]])
    return scheduler, solvers.heun(sigmas), 2


def dpmpp_2m(sigmas):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas)
    return scheduler, solvers.dpmpp_2m(sigmas), 1


def unipc(sigmas):
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=np.array(sigmas[:-1]))
    return scheduler, solvers.unipc(scheduler.sigmas.tolist()), 3


@pytest.mark.parametrize("solver", [heun, dpmpp_2m, unipc], ids=lambda f: f.__name__)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_a_solver_steps_as_its_scheduler(solver, steps):
    sigmas = ScheduleConfig(shift=1.8).sigmas(np.linspace(1.0, 1 / steps, steps).tolist(), 0.0)
    scheduler, evaluations, remembered = solver(sigmas)
    scheduler.set_begin_index(0)
    generator = torch.Generator().manual_seed(5)
    ours = theirs = torch.randn(1, 6, generator=generator)
    kept = [torch.zeros_like(ours)] * remembered
    for run in evaluations:
        velocity = torch.randn(1, 6, generator=generator)
        theirs = scheduler.step(velocity, 0.0, theirs, return_dict=False)[0]
        ours, *kept = run(ours, velocity, kept)
        assert torch.equal(ours, theirs)
    assert torch.isfinite(ours).all()
