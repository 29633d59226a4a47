"""Trains a control branch for the embedded model; its denoiser stays as it is.

Pictures, maps and captions are encoded once into a pool. The objective is the denoiser's own (flow
matching), at the guidance that pictures are drawn with. Pictures and maps of three shapes of
canvas, most of them square.
"""

from __future__ import annotations

import json
import pathlib
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from calotype.serving.engine.control.branch import ControlBranch, control_channels
from calotype.serving.engine.control.hints import Control
from calotype.serving.engine.execution.forward import Forward
from calotype.serving.engine.model.autoencoder import Autoencoder
from calotype.serving.engine.model.components import Components, load_components
from calotype.serving.engine.model.latents import normalize, pack, patchify
from calotype.serving.engine.scheduling.scheduler import Bucket
from calotype.serving.training.control.layouts import (
    KINDS,
    Layout,
    control_map,
    picture,
    sample_layout,
)
from calotype.serving.training.flow import BEST_GUIDANCE, BUCKETS, block_matrix
from calotype.serving.training.loop import Stage, normal

if TYPE_CHECKING:
    import argparse

TOKEN = 16
"""Side of a token in pixels."""
LINES = (1.0, 1.6)
"""Widths of edges in pixels."""
_CHUNK = 64
_KEPT_BYTES = 30 * 2**20


@dataclass
class Pool:
    """Encoded pictures of one shape of canvas.

    Attributes:
        pictures: [n, tokens, channels]; ``maps`` likewise.
        captions: [n], places in ``embeds``.
        embeds: [different captions, text tokens, width].
    """

    columns: int
    rows: int
    pictures: Tensor
    maps: Tensor
    captions: Tensor
    embeds: Tensor


@torch.no_grad()
def tokens_of(vae: Autoencoder, images: Tensor) -> Tensor:
    """Normalised latent tokens [n, tokens, channels] of images [n, 3, height, width]."""
    latents = vae.encode(images.contiguous(memory_format=torch.channels_last))
    statistics = vae.bn
    return pack(
        normalize(
            patchify(latents),
            statistics.running_mean,
            statistics.running_var,
            vae.config.batch_norm_eps,
        )
    )


@torch.no_grad()
def fill_pools(model: Components, count: int, anywhere: float = 0.0) -> list[Pool]:
    """``count`` pictures in all, each with one map; kinds of maps take turns."""
    assert model.text_encoder is not None
    pools = []
    for number, ((columns, rows), share) in enumerate(BUCKETS.items()):
        rng = random.Random(7000 + number)
        width, height = columns * TOKEN, rows * TOKEN
        kinds = [KINDS[i % len(KINDS)] for i in range(max(len(KINDS), int(count * share)))]
        layouts = [sample_layout(rng, False, kind, width, height, anywhere) for kind in kinds]
        pictures, maps = [], []
        for start in tqdm(range(0, len(layouts), _CHUNK), desc=f"maps {columns}x{rows}"):
            part = slice(start, start + _CHUNK)
            pictures.append(tokens_of(model.vae, torch.stack([picture(o) for o in layouts[part]])))
            drawn = [
                control_map(layout, kind, rng.uniform(*LINES))
                for layout, kind in zip(layouts[part], kinds[part], strict=True)
            ]
            maps.append(tokens_of(model.vae, torch.stack(drawn)))
        captions, embeds = _encoded(model, layouts)
        pools.append(
            Pool(
                columns,
                rows,
                torch.cat(pictures).bfloat16(),
                torch.cat(maps).bfloat16(),
                captions,
                embeds,
            )
        )
    return pools


def _encoded(model: Components, layouts: list[Layout]) -> tuple[Tensor, Tensor]:
    assert model.text_encoder is not None
    texts = list(dict.fromkeys(layout.caption for layout in layouts))
    places = {text: place for place, text in enumerate(texts)}
    embeds = [
        one.embeds
        for start in range(0, len(texts), _CHUNK)
        for one in model.text_encoder.encode(texts[start : start + _CHUNK])
    ]
    return torch.tensor([places[o.caption] for o in layouts]), torch.stack(embeds).bfloat16()


class ControlFlow:
    """The flow-matching objective of a branch beside a frozen denoiser."""

    def __init__(self, model: Components, branch: ControlBranch, pools: list[Pool], batch: int):
        self._forward = Forward(model.denoiser)
        self._branch, self._pools, self._batch = branch, pools, batch
        self._missing = control_channels(model.denoiser.config) - pools[0].maps.shape[2]

    def loss(self, generator: torch.Generator) -> Tensor:
        shares = torch.tensor([float(len(pool.pictures)) for pool in self._pools])
        pool = self._pools[int(torch.multinomial(shares, 1, generator=generator))]
        count = max(4, self._batch * 64 // (pool.rows * pool.columns))
        chosen = torch.randint(0, len(pool.pictures), (count,), generator=generator)
        even = (torch.rand(count, generator=generator) + torch.arange(count)) / count
        shift = torch.exp(0.7 + 1.3 * torch.rand(count, generator=generator))
        t = shift * even / (1 + (shift - 1) * even)
        guidance = torch.full((count,), BEST_GUIDANCE)
        clean = pool.pictures[chosen].float()
        noise = normal(clean.shape, generator, "cpu")
        noisy = (1 - t[:, None, None]) * clean + t[:, None, None] * noise
        contexts = torch.nn.functional.pad(pool.maps[chosen].float(), (0, self._missing))
        embeds = pool.embeds[pool.captions[chosen]].float()
        bucket = Bucket(pool.rows, pool.columns, embeds.shape[1])
        controls = [(Control(self._branch, context),) for context in contexts]
        velocity = self._forward(noisy, t, guidance, embeds, bucket, controls=controls)
        return (velocity - (noise - clean)).square().mean()


def train(arguments: argparse.Namespace) -> None:
    """Trains and writes the file; goes on from the last checkpoint when it is run again."""
    torch.manual_seed(0)
    # glibc gives larger blocks than any freed before back to the system, a quarter of the time.
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)
    model = load_components(arguments.model)
    model.denoiser.requires_grad_(False)
    pools = _pools(model, arguments)
    branch = ControlBranch(model.denoiser.config)
    branch.copy_blocks(model.denoiser)
    flow = ControlFlow(model, branch, pools, arguments.batch)
    stage = Stage(
        "control", arguments.work, {"branch": branch}, arguments.minutes, lr=1.5e-3, muon_lr=2e-3,
        matrices=block_matrix, ema=0.995, warmup=50, clock=time.process_time,
    )  # fmt: skip
    if not stage.finished:
        stage.run(flow.loss)
    write_branch(branch, arguments.out)


def _pools(model: Components, arguments: argparse.Namespace) -> list[Pool]:
    path = arguments.work / "pool.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        pools = fill_pools(model, arguments.pictures, arguments.anywhere)
        torch.save([vars(pool) for pool in pools], path)
    return [Pool(**content) for content in torch.load(path, weights_only=True)]


def write_branch(branch: ControlBranch, path: pathlib.Path) -> None:
    """Writes a branch in bfloat16, in the keys of Fun-Controlnet-Union, with what it reads."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().bfloat16().contiguous() for name, t in branch.state_dict().items()}
    save_file(state, str(path), {"control_types": json.dumps(KINDS)})
