"""Samplers step as their diffusers schedulers do, and guidance weighs two passes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from calotype.serving.core.errors import EngineError, InvalidRequest
from calotype.serving.core.request import SAMPLER_NAMES, Finished, Progress, sampler_names
from calotype.serving.engine.execution.forward import Forward
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.sampling import samplers
from calotype.serving.engine.sampling.samplers import SAMPLERS
from calotype.serving.engine.scheduling.scheduler import Bucket
from calotype.serving.testing.models import MAX_SEQUENCE_LENGTH, OUT_LAYERS, save_tiny_flux2

CLOSE = {"atol": 1e-4, "rtol": 0}
PROMPT = "a red circle on a blue background"


def euler(steps, mu):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler, scheduler.sigmas[:-1]


def heun(steps, mu):
    from diffusers import FlowMatchHeunDiscreteScheduler

    sigmas = euler(steps, mu)[0].sigmas
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    levels = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2)])
    scheduler.sigmas = torch.cat([levels, sigmas[-1:]])
    return scheduler, levels


def dpmpp_2m(steps, mu):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++"
    )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = euler(steps, mu)[0].sigmas
    return scheduler, scheduler.sigmas[:-1]


def unipc(steps, mu):
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler, scheduler.sigmas[:-1]


def lcm(steps, mu):
    from diffusers import FlowMatchLCMScheduler

    scheduler = FlowMatchLCMScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler, scheduler.sigmas[:-1]


BY_HAND = {
    "flow-euler": euler,
    "flow-heun": heun,
    "flow-dpmpp-2m": dpmpp_2m,
    "flow-unipc": unipc,
    "flow-lcm": lcm,
}


@torch.no_grad()
def drawn_by_hand(oracle, name, steps, seed, told=3.0, negative=None, weight=1.0):
    """Packed latents of a 64x64 image from diffusers' transformer and scheduler in a loop."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn((1, oracle.transformer.config.in_channels, 4, 4), generator=generator)
    latents = noise.flatten(2).transpose(1, 2)
    scheduler, levels = BY_HAND[name](steps, compute_empirical_mu(16, steps))
    scheduler.set_begin_index(0)

    def predict(prompt, sigma):
        embeds, text_ids = oracle.encode_prompt(
            prompt,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            text_encoder_out_layers=OUT_LAYERS,
        )
        return oracle.transformer(
            hidden_states=latents,
            timestep=sigma.view(1),
            guidance=torch.tensor([told]),
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=oracle._prepare_latent_ids(noise),
            return_dict=False,
        )[0]

    extra = {"generator": generator} if name == "flow-lcm" else {}
    for sigma in levels:
        velocity = predict(PROMPT, sigma)
        if negative is not None:
            other = predict(negative, sigma)
            velocity = other + weight * (velocity - other)
        latents = scheduler.step(velocity, sigma * 1000, latents, return_dict=False, **extra)[0]
    return latents[0]


def test_the_names_that_the_api_offers_are_the_samplers_there_are():
    assert tuple(SAMPLERS) == SAMPLER_NAMES == sampler_names()


@pytest.mark.parametrize("steps", [1, 2, 5, 17])
@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_equals_its_diffusers_scheduler_run_by_hand(engine, oracle, make_request, name, steps):
    engine.add(make_request(sampler=name, steps=steps, seed=11))
    drawn = engine.run()
    assert [e.step for e in drawn.of(Progress, "r")] == list(range(1, steps + 1))
    theirs = drawn_by_hand(oracle, name, steps, 11)
    assert theirs.std() > 0.1
    torch.testing.assert_close(drawn.latents["r", 0], theirs, **CLOSE)


def test_samplers_share_a_batch_and_each_draws_its_own_image(engine, new_engine, make_request):
    for name in SAMPLER_NAMES:
        engine.add(make_request(name, sampler=name, steps=5))
    together = engine.run()
    assert engine.batches[0] == len(SAMPLER_NAMES)
    for name in SAMPLER_NAMES:
        alone = new_engine()
        alone.add(make_request(name, sampler=name, steps=5))
        np.testing.assert_allclose(together.image(name), alone.run().image(name), **CLOSE)
        for other in SAMPLER_NAMES:
            if other != name:
                assert np.abs(together.image(name) - together.image(other)).max() > 1e-3


def test_heun_costs_two_evaluations_a_step_but_the_last(engine, make_request):
    engine.add(make_request(sampler="flow-heun", steps=4))
    assert engine.run().ending("r").evaluations == len(engine.batches) == 7


@pytest.mark.parametrize("sigmas", [(1.0,), (1.0, 0.6, 0.59, 0.1), (0.9, 0.2)])
def test_custom_sigmas_equal_the_pipelines(engine, oracle, draw_with, make_request, sigmas):
    engine.add(make_request(sigmas=sigmas, steps=len(sigmas)))
    theirs = draw_with(oracle, sigmas=list(sigmas), steps=len(sigmas))
    np.testing.assert_allclose(engine.run().image("r"), theirs, **CLOSE)


@pytest.mark.parametrize(
    "sigmas",
    [
        (1.0, 0.5, 0.5),
        (0.5, 0.7, 0.1),
        (1.2, 0.5, 0.1),
        (1.0, 0.5, 0.0),
        (1.0, 0.5),
        (1.0, float("nan"), 0.1),
        (float("inf"), 0.5, 0.1),
    ],
)
def test_bad_sigmas_are_refused(engine, make_request, sigmas):
    with pytest.raises(InvalidRequest, match="sigmas must") as caught:
        engine.add(make_request(sigmas=sigmas, steps=3))
    assert caught.value.param == "sigmas"


@pytest.mark.parametrize("steps", [0, 51])
def test_too_few_and_too_many_steps_are_refused(new_engine, make_request, steps):
    with pytest.raises(InvalidRequest, match=f"steps must be 1 to 50; got {steps}") as caught:
        new_engine(max_steps=50).add(make_request(steps=steps))
    assert caught.value.param == "steps"


@pytest.mark.parametrize("name", ["flow-euler", "flow-unipc"])
def test_negative_prompt_is_classifier_free_guidance(engine, oracle, make_request, name):
    negative = "a blue star on the left"
    engine.add(make_request("cfg", sampler=name, guidance=2.5, negative_prompt=negative))
    engine.add(make_request("plain", sampler=name, guidance=2.5))
    engine.add(
        make_request("both", sampler=name, negative_prompt=negative, guidance=3, true_guidance=0.5)
    )
    drawn = engine.run()
    theirs = drawn_by_hand(oracle, name, 4, 7, told=1.0, negative=negative, weight=2.5)
    torch.testing.assert_close(drawn.latents["cfg", 0], theirs, **CLOSE)
    theirs = drawn_by_hand(oracle, name, 4, 7, told=3.0, negative=negative, weight=0.5)
    torch.testing.assert_close(drawn.latents["both", 0], theirs, **CLOSE)
    assert np.abs(drawn.image("cfg") - drawn.image("plain")).max() > 1e-3
    assert drawn.ending("cfg").evaluations == 2 * drawn.ending("plain").evaluations


@pytest.mark.parametrize(("passes", "rows"), [(1, 1), (2, 1), (3, 2), (4, 2), (8, 3)])
def test_a_negative_prompt_takes_two_places_of_a_batch(new_engine, make_request, passes, rows):
    alone = new_engine()
    alone.add(make_request(negative_prompt="a star", seed=8))
    engine = new_engine(max_batch_rows=passes)
    engine.add(make_request("plain", priority=1))
    engine.add(make_request(negative_prompt="a star", n=2))
    drawn = engine.run()
    assert max(engine.batches) == rows
    np.testing.assert_allclose(drawn.image("r", 1), alone.run().image("r"), **CLOSE)


def test_undistilled_klein_equals_its_pipeline(
    tmp_path, load_oracle, draw_with, new_engine, make_request
):
    folder = save_tiny_flux2(tmp_path / "klein", klein=True)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": False}))
    engine = new_engine(load_components(folder))
    request = make_request(guidance=3.5)
    assert engine.prompts_of(request) == (PROMPT, "")
    engine.add(request)
    theirs = draw_with(load_oracle(folder), guidance=3.5)
    np.testing.assert_allclose(engine.run().image("r"), theirs, **CLOSE)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with two samplers, as pip would install it."""
    (tmp_path / "own_samplers.py").write_text(
        """
class Straight:
    def __init__(self, schedule, noise):
        self.schedule, self.done, self.evaluations = schedule, 0, schedule.steps

    timestep = property(lambda self: self.schedule.timesteps(self.schedule.sigmas)[self.done])
    sigma = property(lambda self: self.schedule.sigmas[self.done])

    def step(self, velocity, latents):
        now, after = self.schedule.sigmas[self.done : self.done + 2]
        self.done += 1
        return latents + (after - now) * velocity

    def remembered(self):
        return []

    def restore(self, done, remembered):
        self.done = done


class Broken(Straight):
    def step(self, velocity, latents):
        if self.done == 1:
            raise KeyError("bug of the package")
        return super().step(velocity, latents)
"""
    )
    info = tmp_path / "own_samplers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-samplers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[calotype.samplers]\nflow-own = own_samplers:Straight\n"
        "flow-broken = own_samplers:Broken\nflow-gone = own_samplers:Nothing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    samplers._added.cache_clear()
    yield
    samplers._added.cache_clear()


def test_a_package_adds_samplers_by_an_entry_point(installed, engine, make_request):
    assert sampler_names() == (*SAMPLER_NAMES, "flow-broken", "flow-gone", "flow-own")
    engine.add(make_request("own", sampler="flow-own"))
    engine.add(make_request("euler"))
    engine.add(make_request("broken", sampler="flow-broken"))
    drawn = engine.run()
    np.testing.assert_allclose(drawn.image("own"), drawn.image("euler"), **CLOSE)
    assert isinstance(drawn.ending("own"), Finished)
    assert isinstance(drawn.ending("broken").error, EngineError)
    with pytest.raises(EngineError, match="'flow-gone' of own_samplers:Nothing cannot be used"):
        engine.add(make_request(sampler="flow-gone"))
    with pytest.raises(InvalidRequest, match="flow-dpmpp-2m, flow-euler, flow-gone, flow-heun"):
        engine.add(make_request(sampler="flow-unknown"))


def test_forward_equals_the_models_own(components, oracle):
    generator = torch.Generator().manual_seed(0)
    config = oracle.transformer.config
    hidden = torch.randn(2, 15, config.in_channels, generator=generator)
    embeds = torch.randn(2, 8, config.joint_attention_dim, generator=generator)
    time, told = torch.tensor([0.9, 0.2]), torch.tensor([1.0, 4.0])
    forward = Forward(components.denoiser)
    with torch.no_grad():
        theirs = oracle.transformer(
            hidden_states=hidden,
            timestep=time,
            guidance=told,
            encoder_hidden_states=embeds,
            txt_ids=oracle._prepare_text_ids(embeds),
            img_ids=oracle._prepare_latent_ids(torch.zeros(2, 1, 3, 5)),
            return_dict=False,
        )[0]
        ours = forward(hidden, time, told, embeds, Bucket(3, 5, 8))
    torch.testing.assert_close(ours, theirs)
