"""Stage 1 and 2: the autoencoder, then its decoder alone on noisy latents with heavy edges."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from calotype.serving.training.captions import sample_scene
from calotype.serving.training.loop import Stage, normal
from calotype.serving.training.scene_classifier import score
from calotype.serving.training.scenes import NATIVE, Scene, render, to_uint8

KL_WEIGHT = 2e-4
SMALL = 0.5
"""Share of the images in which a single thing is small: there a few pixels make the outline."""
FINE = ("star", "star", "ring", "cross")
"""Outlines that half of the single things have, because they are the hardest."""


def scene_pool(count: int, seed: int, striped: float = 0.15) -> list[Scene]:
    """Scenes of every combination: the autoencoder is measured on images, not on captions."""
    rng = random.Random(seed)
    pool = []
    for _ in range(count):
        scene = sample_scene(rng, None, two=rng.random() < 0.25)
        if len(scene.things) == 1:
            thing = scene.things[0]
            if rng.random() < SMALL:
                thing = dataclasses.replace(thing, size="small")
            if rng.random() < 0.5:
                thing = dataclasses.replace(thing, shape=rng.choice(FINE))
            scene = dataclasses.replace(scene, things=(thing,))
        pool.append(dataclasses.replace(scene, striped=rng.random() < striped))
    return pool


class Images:
    """A pool of rendered images on the device, a quarter of them from a canvas twice as large."""

    def __init__(self, count: int, device: str) -> None:
        generator = torch.Generator().manual_seed(11)
        self.device = device
        chunks = []
        scenes = scene_pool(count, 12)
        for start in tqdm(range(0, count, 250), desc="rendering", mininterval=5.0):
            part = scenes[start : start + 250]
            if (start // 250) % 4:
                drawn = render(part, generator, device=device)
            else:
                drawn = render(part, generator, 2 * NATIVE, 2 * NATIVE, device)
                top, left = (int(v) for v in torch.randint(0, NATIVE, (2,), generator=generator))
                drawn = drawn[:, :, top : top + NATIVE, left : left + NATIVE]
            chunks.append(((drawn + 1) * 127.5).round().to(torch.uint8))
        self.pool = torch.cat(chunks)

    def batch(self, size: int, side: int, generator: torch.Generator) -> Tensor:
        """float32 [size, 3, side, side] in -1..1: crops around a point of an outline each."""
        rows = torch.randint(0, len(self.pool), (size,), generator=generator).to(self.device)
        whole = self.pool[rows].float() / 127.5 - 1
        if side < NATIVE:
            outline = _near_edges(whole).flatten(1) + 1e-6
            at = torch.multinomial(outline.cpu(), 1, generator=generator)[:, 0]
            moved = torch.randint(-side // 4, side // 4 + 1, (2, size), generator=generator)
            corner = torch.stack([at // NATIVE, at % NATIVE]) + moved - side // 2
            tops, lefts = corner.clamp(0, NATIVE - side).tolist()
            whole = torch.stack(
                [
                    image[:, top : top + side, left : left + side]
                    for image, top, left in zip(whole, tops, lefts, strict=True)
                ]
            )
        return whole.contiguous(memory_format=torch.channels_last)


def train_autoencoder(
    vae: Any, stage: Stage, decoder_stage: Any, images: Images, batch: int, device: str
) -> None:
    """Both stages in turn; ``decoder_stage`` makes the second one when the first is over."""

    def reconstruction(generator: torch.Generator) -> Tensor:
        side = 64 if torch.rand((), generator=generator) < 0.8 else NATIVE
        x = images.batch(batch if side == 64 else batch // 4, side, generator)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            posterior = vae.encode(x).latent_dist
            noise = normal(posterior.mean.shape, generator, device)
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        loss: Tensor = weighted_error(y.float(), x) + KL_WEIGHT * kl
        return loss

    probe = scene_pool(64, 77)
    shown = render(probe, torch.Generator().manual_seed(78)).to(device)

    def check() -> dict[str, object]:
        mean = vae.encode(shown).latent_dist.mode()
        noise = normal(mean.shape, torch.Generator().manual_seed(1), device)
        spread = mean.std(dim=(0, 2, 3), keepdim=True)
        y = vae.decode(mean + 0.1 * spread * noise).sample
        plain = [i for i, s in enumerate(probe) if not s.striped]
        images_back = to_uint8(y).numpy()
        result = score([probe[i] for i in plain], [images_back[i] for i in plain])
        return {
            "l1": round(F.l1_loss(y, shown).item(), 4),
            **{k: round(v, 3) for k, v in result.items()},
        }

    if not stage.finished:
        stage.run(reconstruction, check)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    decoder: Stage = decoder_stage()
    with torch.no_grad():
        sample = vae.encode(
            images.batch(64, NATIVE, torch.Generator().manual_seed(3))
        ).latent_dist.mode()
        spread = sample.std(dim=(0, 2, 3), keepdim=True)

    def sharpening(generator: torch.Generator) -> Tensor:
        x = images.batch(batch, 64, generator)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            with torch.no_grad():
                mean = vae.encode(x).latent_dist.mode()
            amount = torch.rand(len(x), 1, 1, 1, generator=generator).to(device) * 0.2
            noise = normal(mean.shape, generator, device)
            y = vae.decode(mean + amount * spread * noise).sample.float()
        return weighted_error(y, x)

    if not decoder.finished:
        decoder.run(sharpening, check, 2)


def weighted_error(y: Tensor, x: Tensor) -> Tensor:
    """Squared and absolute error of images, six times as heavy near an outline."""
    weight = 1 + 5 * _near_edges(x)
    error: Tensor = (weight * ((y - x).abs() * 0.5 + (y - x) ** 2)).mean() / weight.mean()
    return error


def _near_edges(x: Tensor) -> Tensor:
    """1 within two pixels of a change of colour, 0 far from it; [n, 1, h, w]."""
    with torch.no_grad():
        local = F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)
        return F.max_pool2d(local.amax(1, keepdim=True).clamp(max=1), 5, 1, 2)
