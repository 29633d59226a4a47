"""A training on the embedded model with random pictures of 64 pixels: no encoder, a fast step.

`python training_run.py FOLDER KILLED_AT...` runs one again and again and kills it (SIGKILL) before
each of these steps, in processes of its own.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from calotype.serving.engine.model.components import Components, load_components
from calotype.serving.engine.sizing.training_plan import Phase
from calotype.serving.training.lora.cache import CachedSet, write_tensors
from calotype.serving.training.lora.checkpoint import Checkpoints, tensors_digest
from calotype.serving.training.lora.recipe import Recipe
from calotype.serving.training.lora.reporting import EventLog
from calotype.serving.training.lora.trainer import Factors, Trainer
from calotype.serving.training.lora.workers import Workers
from calotype.serving.weights.sources import BUILT_IN

STEPS = 7
RECIPE = Recipe(
    (Phase(4, 64), Phase(STEPS - 4, 96)),
    batch=2,
    rank=4,
    alpha=4.0,
    learning_rate=1e-3,
    guidance=3.0,
    ema=0.98,
    caption_dropout=0.3,
    preserve_every=2,
    recompute=False,
    precision="float32",
    checkpoint_every=2,
)


def components() -> Components:
    torch.set_num_threads(1)
    return load_components(BUILT_IN / "shapes", parts=("denoiser", "vae"))


def write_random_cache(path: pathlib.Path, pictures: int = 5) -> None:
    """Two sizes of pictures at each of two resolutions."""
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for resolution, side in ((64, 4), (96, 6)):
        for rows, columns, items in ((side, side, range(3)), (side, side - 2, range(3, pictures))):
            name = f"{resolution}x{rows}x{columns}"
            shape = (len(items), rows * columns, 48)
            tensors[f"latents.{name}"] = torch.randn(shape, generator=draw)
            tensors[f"items.{name}"] = torch.tensor(list(items))
    tensors["text"] = torch.randn((pictures, 32, 192), generator=draw)
    tensors["classes"] = torch.randn((2, pictures, 32, 192), generator=draw)
    tensors["empty"] = torch.randn((32, 192), generator=draw)
    write_tensors(path, tensors, {})


def make_trainer(
    model: Components,
    folder: pathlib.Path,
    recipe: Recipe = RECIPE,
    *,
    stopping: Callable[[], bool] = lambda: False,
    workers: Workers | None = None,
    sinks: tuple[Any, ...] = (),
    **options: Any,
) -> Trainer:
    """A run in a folder; the same call goes on with it."""
    cache = folder / "cache.safetensors"
    if not cache.exists():
        write_random_cache(cache)
    run = {"recipe": recipe.digest, "dataset": "random", "base": model.fingerprint}
    return Trainer(
        model,
        CachedSet(cache, torch.device("cpu")),
        recipe,
        EventLog(folder, sinks),
        Checkpoints(folder / "checkpoints", run, recipe.keep_checkpoints),
        stopping=stopping,
        workers=workers,
        **options,
    )


def digest_of(factors: Factors | None) -> str:
    assert factors is not None, "the run was stopped"
    flat = {f"{name}.{k}": t for name, pair in factors.items() for k, t in enumerate(pair)}
    return tensors_digest(flat)


def run_and_die(model: Components, folder: pathlib.Path, before: int) -> None:
    """Trains until step ``before`` would begin, and is gone without a word."""
    trainer = make_trainer(
        model,
        folder,
        stopping=lambda: trainer.step == before and bool(os.kill(os.getpid(), signal.SIGKILL)),
    )
    trainer.run()


def main() -> None:
    folder, steps = pathlib.Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]
    model = components()
    for before in steps:
        child = os.fork()
        if not child:
            run_and_die(model, folder, before)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


if __name__ == "__main__":
    main()
