"""Stage 3 and 4: the denoiser with its text encoder, then guidance distilled into it.

FLUX.2 [dev] takes the guidance scale as an input and runs one pass a step; so does the miniature:
a student learns what a frozen teacher gives with two passes (Meng et al. 2023).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from calotype.serving.training import miniature
from calotype.serving.training.captions import sample_scene, with_surroundings
from calotype.serving.training.loop import Stage, normal, rank, world_size
from calotype.serving.training.scenes import NATIVE, Scene, render

BUCKETS: dict[tuple[int, int], float] = {(8, 8): 0.84, (8, 14): 0.08, (14, 8): 0.08}
"""(columns, rows) of 16-pixel tokens -> share of the steps: DALL-E's three aspects."""
TWO_THINGS = 0.25
"""Share of scenes with two things."""

OFTEN = {"star": 1.0, "ring": 0.9, "triangle": 0.7, "cross": 0.7, "small": 0.5}
"""How readily a scene with this shape is taken (others: 0.4), and how much more readily when its
thing is small: these are the harder outlines."""

EMPTY_CAPTIONS = 0.1
TEACHER_GUIDANCE = 4.0
GUIDANCE = (1.0, 6.0)
PASSES_PER_GUIDANCE = 0.5
"""The two-pass scale that a guidance input stands for: 4 is twice."""
BEST_GUIDANCE = 3.0
"""Measured: higher bends the colours, lower leaves stars blunt."""
USUAL_GUIDANCE, USUAL = 2.5, 0.6
"""Where most of the student's rows are, and their share; the others are spread."""


@dataclasses.dataclass
class Latents:
    """Normalised latent tokens [n, rows * columns, 48] of one bucket, and their captions' ids."""

    columns: int
    rows: int
    tokens: Tensor
    ids: Tensor
    mask: Tensor


def sample_scenes(count: int, rng: random.Random, striped: bool = False) -> list[Scene]:
    """Scenes to train on: none is held out, and harder outlines come more often."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng, False, two=rng.random() < TWO_THINGS)
        if rng.random() < max(
            OFTEN.get(thing.shape, 0.4) * (1 if thing.size == "small" else OFTEN["small"])
            for thing in scene.things
        ):
            scenes.append(dataclasses.replace(scene, striped=striped))
    return scenes


@torch.no_grad()
def encode_buckets(
    vae: Any, processor: Any, scenes: int, device: str, striped: bool = False
) -> list[Latents]:
    """Draws, encodes and normalises ``scenes`` images for all buckets and processes together.

    The first bucket also sets ``vae.bn``, where FLUX.2 keeps its latents' mean and variance.
    """
    found = []
    for number, ((columns, rows), share) in enumerate(BUCKETS.items()):
        count = max(64, int(scenes * share / world_size()))
        rng = random.Random(1000 + 100 * rank() + number)
        pool = sample_scenes(count, rng, striped)
        generator = torch.Generator().manual_seed(2000 + 100 * rank() + number)
        tokens = []
        chunk = max(8, 8192 // (columns * rows))
        for start in tqdm(
            range(0, count, chunk), desc=f"latents {columns}x{rows}", mininterval=5.0
        ):
            part = pool[start : start + chunk]
            image = render(part, generator, columns * 16, rows * 16, device)
            tokens.append(miniature.patchify(vae.encode(image).latent_dist.mode()))
        packed = torch.cat(tokens)
        if number == 0 and not striped:
            moments = torch.stack([packed.mean((0, 1)), packed.var((0, 1))])
            if world_size() > 1:
                torch.distributed.all_reduce(moments)
            vae.bn.running_mean.copy_(moments[0] / world_size())
            vae.bn.running_var.copy_(moments[1] / world_size())
        scale = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        packed = ((packed - vae.bn.running_mean) / scale).to(torch.bfloat16)
        ids, mask = miniature.token_ids(
            processor, [with_surroundings(s.caption, rng) for s in pool]
        )
        found.append(Latents(columns, rows, packed, ids.to(device), mask.to(device)))
    return found


class Flow:
    """The velocity objective over the buckets."""

    def __init__(
        self,
        denoiser: Any,
        text_encoder: Any,
        processor: Any,
        latents: Sequence[Latents],
        batch: int,
        device: str,
    ) -> None:
        self.denoiser = denoiser
        self.text_encoder = text_encoder
        self.latents = latents
        self.batch = batch
        self.device = device
        self.positions = {
            (b.columns, b.rows): miniature.position_ids(b.rows, b.columns, device) for b in latents
        }
        ids, mask = miniature.token_ids(processor, [""])
        self.empty = ids.to(device), mask.to(device)

    def velocity(
        self, model: Any, bucket: Latents, x: Tensor, t: Tensor, text: Tensor, guidance: Tensor
    ) -> Tensor:
        image_ids, text_ids = self.positions[bucket.columns, bucket.rows]
        predicted: Tensor = model(
            hidden_states=x,
            timestep=t,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return predicted

    def draw(
        self, generator: torch.Generator
    ) -> tuple[Latents, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A bucket and, for its batch: clean tokens, noise, t in 0..1, caption ids and mask.

        Times are spread evenly and then shifted as FLUX.2 shifts its own, by exp(mu) with mu
        between what it takes for 200 steps and for 10.
        """
        shares = torch.tensor(list(BUCKETS.values()))
        bucket = self.latents[int(torch.multinomial(shares, 1, generator=generator))]
        count = max(8, self.batch * 64 // (bucket.columns * bucket.rows))
        rows = torch.randint(0, len(bucket.tokens), (count,), generator=generator)
        even = (torch.rand(count, generator=generator) + torch.arange(count)) / count
        shift = torch.exp(0.7 + 1.3 * torch.rand(count, generator=generator))
        t = (shift * even / (1 + (shift - 1) * even)).to(self.device)
        dropped = (torch.rand(count, generator=generator) < EMPTY_CAPTIONS).to(self.device)
        rows = rows.to(self.device)
        clean = bucket.tokens[rows].float()
        noise = normal(clean.shape, generator, self.device)
        ids = torch.where(dropped[:, None], self.empty[0], bucket.ids[rows])
        mask = torch.where(dropped[:, None], self.empty[1], bucket.mask[rows])
        return bucket, clean, noise, t, ids, mask

    def loss(self, generator: torch.Generator, scale: float = TEACHER_GUIDANCE) -> Tensor:
        bucket, clean, noise, t, ids, mask = self.draw(generator)
        noisy = (1 - t[:, None, None]) * clean + t[:, None, None] * noise
        guidance = torch.full_like(t, scale)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            text = miniature.encode_text(self.text_encoder, ids, mask)
            v = self.velocity(self.denoiser, bucket, noisy, t, text, guidance)
        return (v.float() - (noise - clean)).square().mean()

    def distillation(self, teacher: Any, generator: torch.Generator) -> Tensor:
        """The student's one pass at guidance g against the teacher's two."""
        bucket, clean, noise, t, ids, mask = self.draw(generator)
        noisy = (1 - t[:, None, None]) * clean + t[:, None, None] * noise
        low, high = GUIDANCE
        spread = low + (high - low) * torch.rand(len(t), generator=generator)
        usual = torch.rand(len(t), generator=generator) < USUAL
        g = torch.where(usual, USUAL_GUIDANCE, spread).to(self.device)
        scale = g * PASSES_PER_GUIDANCE
        plain = torch.full_like(t, TEACHER_GUIDANCE)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            with torch.no_grad():
                text = miniature.encode_text(self.text_encoder, ids, mask)
                empty = miniature.encode_text(self.text_encoder, *self.empty)
                asked = self.velocity(teacher, bucket, noisy, t, text, plain).float()
                free = self.velocity(
                    teacher, bucket, noisy, t, empty.expand(len(t), -1, -1), plain
                ).float()
            v = self.velocity(self.denoiser, bucket, noisy, t, text, g)
        return (v.float() - (free + scale[:, None, None] * (asked - free))).square().mean()


def train_denoiser(flow: Flow, stage: Stage, check: Any) -> None:
    if not stage.finished:
        stage.run(flow.loss, check, 6)


def distil_guidance(flow: Flow, make_stage: Any, check: Any) -> None:
    """Replaces ``flow.denoiser``'s weights by the student's; the text encoder stays as it is."""
    teacher = copy.deepcopy(flow.denoiser).eval().requires_grad_(False)
    flow.text_encoder.requires_grad_(False)
    stage: Stage = make_stage()
    if not stage.finished:
        stage.run(lambda g: flow.distillation(teacher, g), check, 3)


def block_matrix(name: str, parameter: Tensor) -> bool:
    """The matrices of attention and MLP blocks, which Muon trains; AdamW has the rest."""
    return parameter.ndim == 2 and ("blocks" in name or ".layers." in name)


@torch.no_grad()
def draw_images(
    flow: Flow, vae: Any, processor: Any, captions: list[str], guidance: float, steps: int = 20
) -> Tensor:
    """A short sampler for the log: float32 [n, 3, 128, 128]; FLUX.2's shift at 20 steps."""
    side = NATIVE // 16
    bucket = next(b for b in flow.latents if (b.columns, b.rows) == (side, side))
    ids, mask = (t.to(flow.device) for t in miniature.token_ids(processor, captions))
    text = miniature.encode_text(flow.text_encoder, ids, mask)
    generator = torch.Generator().manual_seed(5)
    shape = (len(captions), side * side, miniature.TOKEN_CHANNELS)
    x = torch.randn(shape, generator=generator).to(flow.device)
    even = torch.linspace(1, 1 / steps, steps)
    sigmas = [*(6.2 * even / (1 + 5.2 * even)).tolist(), 0.0]
    g = torch.full((len(captions),), guidance, device=flow.device)
    for sigma, following in itertools.pairwise(sigmas):
        v = flow.velocity(flow.denoiser, bucket, x, torch.full_like(g, sigma), text, g)
        x = x + (following - sigma) * v
    scale = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    decoded: Tensor = vae.decode(
        miniature.unpatchify(x * scale + vae.bn.running_mean, side, side)
    ).sample
    return decoded
