"""Steps a second of the LoRA trainer against the arithmetic of diffusers' own script for FLUX.2.

Both train the same factors on the same cached latents and embeddings of one model, a step of one
and a step of the other in turn. The other side is what diffusers' train_dreambooth_lora_flux2.py
does with ``--cache_latents``, in its order and with its classes: PEFT's LoRA on diffusers'
Flux2Transformer2DModel, its drawing of times, its weighting, AdamW, clipping and rate schedule.
Time is the process's own CPU time, which other processes on the machine cost less than wall time.
"""

from __future__ import annotations

import copy
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from engine_load import Rows, row

from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.sizing.training_plan import Phase
from calotype.serving.training.lora.cache import CachedSet, step_generator, write_tensors
from calotype.serving.training.lora.factors import LoraFactors
from calotype.serving.training.lora.objective import Objective, learning_rate
from calotype.serving.training.lora.optimizer import Optimizer
from calotype.serving.training.lora.recipe import Recipe
from calotype.serving.training.lora.targets import find_targets, target_names
from calotype.serving.weights.sources import BUILT_IN

FOLDER = BUILT_IN / "shapes"
PICTURES, BATCH, RANK, RATE, GUIDANCE = 20, 8, 8, 1e-3, 3.0
SIDE, TEXT, PAIRS = 8, 32, 30


def measure() -> Rows:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        data = _pictures(pathlib.Path(scratch))
        ours, theirs = our_step(data), their_step(data)
        for _ in range(3):
            ours()
            theirs()
        pairs = [(_cpu(ours), _cpu(theirs)) for _ in range(PAIRS)]
    ratio = statistics.median(b / a for a, b in pairs)
    return {
        "LoRA training, steps a second": row(ratio, "x diffusers' FLUX.2 script", 1.2, "higher"),
        "CPU time of our step, batch of 8 at 128x128": row(
            statistics.median(a for a, _ in pairs), "s", None, "lower"
        ),
    }


def _cpu(step: Callable[[], None]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def _pictures(scratch: pathlib.Path) -> pathlib.Path:
    """A cache of random pictures, 128x128 for the embedded model."""
    draw = torch.Generator().manual_seed(0)
    path = scratch / "cache.safetensors"
    place = f"128x{SIDE}x{SIDE}"
    tensors = {
        f"latents.{place}": torch.randn((PICTURES, SIDE * SIDE, 48), generator=draw),
        f"items.{place}": torch.arange(PICTURES),
        "text": torch.randn((PICTURES, TEXT, 192), generator=draw),
        "empty": torch.randn((TEXT, 192), generator=draw),
    }
    write_tensors(path, tensors, {})
    return path


def our_step(data: pathlib.Path) -> Callable[[], None]:
    """A step without preservation, which the script does not have."""
    model = load_components(FOLDER, parts=("denoiser",)).denoiser
    recipe = Recipe(
        (Phase(1000, 128),), batch=BATCH, rank=RANK, alpha=RANK, learning_rate=RATE,
        guidance=GUIDANCE, ema=0.98, preserve_every=0, recompute=False, precision="float32",
    )  # fmt: skip
    factors = LoraFactors(find_targets(model, model.config), rank=RANK, scale=1.0, seed=0)
    objective = Objective(model, factors, guidance=GUIDANCE)
    optimizer = Optimizer(factors.vector, recipe)
    cached = CachedSet(data, torch.device("cpu"))
    done = 0

    def step() -> None:
        nonlocal done
        gradient = factors.vector.grad
        assert gradient is not None
        gradient.zero_()
        batch = cached.batch(done, 128, BATCH, 0.0, 0)
        loss = objective.loss(batch, step_generator(0, done))
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()
        optimizer.step(done, learning_rate(done, 1000, RATE))
        done += 1

    return step


def their_step(data: pathlib.Path) -> Callable[[], None]:
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import (
        compute_density_for_timestep_sampling,
        compute_loss_weighting_for_sd3,
    )
    from peft import LoraConfig
    from safetensors.torch import load_file

    transformer: Any = Flux2Transformer2DModel.from_pretrained(FOLDER, subfolder="transformer")
    transformer = transformer.to(torch.float32).requires_grad_(False)
    targets = list(target_names(load_components(FOLDER, parts=("denoiser",)).denoiser.config))
    transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets)
    )
    transformer.train()
    trained = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-4)
    schedule = get_scheduler("constant", optimizer=optimizer)
    noise_schedule: Any = copy.deepcopy(
        FlowMatchEulerDiscreteScheduler.from_pretrained(FOLDER, subfolder="scheduler")
    )
    found = load_file(str(data))
    tokens = found[f"latents.128x{SIDE}x{SIDE}"]
    # The script keeps what the VAE gave, and patchifies and normalises it in every step.
    whole = tokens.transpose(1, 2).reshape(PICTURES, 48, SIDE, SIDE)
    latents = Flux2Pipeline._unpatchify_latents(whole)
    mean, deviation = torch.zeros(1, 48, 1, 1), torch.ones(1, 48, 1, 1)
    cache = [latents[i : i + 1] for i in range(PICTURES)]
    text = [found["text"][i : i + 1] for i in range(PICTURES)]
    ids = [Flux2Pipeline._prepare_text_ids(t) for t in text]

    def sigmas_of(times: torch.Tensor, dims: int) -> torch.Tensor:
        known = noise_schedule.timesteps
        place = [(known == t).nonzero().item() for t in times]
        sigma = noise_schedule.sigmas[place].flatten()
        return sigma.reshape(-1, *[1] * (dims - 1))

    def step() -> None:
        chosen = torch.randperm(PICTURES)[:BATCH].tolist()
        embeds = torch.cat([text[i] for i in chosen])
        text_ids = torch.cat([ids[i] for i in chosen])
        clean = Flux2Pipeline._patchify_latents(torch.cat([cache[i] for i in chosen]))
        clean = (clean - mean) / deviation
        image_ids = Flux2Pipeline._prepare_latent_ids(clean)
        noise = torch.randn_like(clean)
        u = compute_density_for_timestep_sampling(
            weighting_scheme="none", batch_size=BATCH, logit_mean=0.0, logit_std=1.0,
            mode_scale=1.29,
        )  # fmt: skip
        times = noise_schedule.timesteps[(u * noise_schedule.config.num_train_timesteps).long()]
        sigmas = sigmas_of(times, clean.ndim)
        noisy = (1.0 - sigmas) * clean + sigmas * noise
        guidance = torch.full([1], GUIDANCE).expand(BATCH)
        predicted = transformer(
            hidden_states=Flux2Pipeline._pack_latents(noisy),
            timestep=times / 1000,
            guidance=guidance,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        predicted = Flux2Pipeline._unpack_latents_with_ids(predicted, image_ids)
        weighting = compute_loss_weighting_for_sd3(weighting_scheme="none", sigmas=sigmas)
        target = noise - clean
        error = (weighting.float() * (predicted.float() - target.float()) ** 2).reshape(BATCH, -1)
        loss = error.mean(1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.detach().item()

    return step
