"""Trains a concept that the embedded model has never seen by the command, and counts what is right.

``python tests/bench/training_concept.py FOLDER`` writes 20 pictures (`samples.framed`), runs
`calotype train lora` on them, and draws 200 prompts whose scenes no training saw through the
serving engine: with the trigger and the adapter, and class prompts without the trigger, with the
adapter and without. ``--adapter FILE`` draws with one that is there. Run it again to go on with a
stopped training.
"""

from __future__ import annotations

import sys

# Python looks beside a script first, where operator.py is not the standard library's module.
sys.path.pop(0)

import argparse
import json
import math
import pathlib
import resource
import subprocess
import time
from collections.abc import Sequence

sys.path.append(str(pathlib.Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray
from samples import framed

from calotype.serving.config import local_model
from calotype.serving.core.request import (
    AdapterRef,
    Failed,
    Finished,
    GenerationRequest,
    ImageSize,
    SamplingParams,
)
from calotype.serving.engine.engine import Engine
from calotype.serving.training.scene_classifier import matches
from calotype.serving.worker.model_loader import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--adapter", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    told: dict[str, object] = {}
    adapter = given.adapter or train(given.folder, given.steps, given.threads, told)
    spec = local_model("shapes")
    engine = load_model(
        spec,
        parts=("text_encoder", "denoiser", "vae"),
        torch_threads=given.threads,
        accelerated=False,
    ).engine
    engine.adapters.load("it", adapter, wait=60)
    scenes = framed.scenes(given.prompts, 777, held_out=True)
    asked = [f"{scene.caption}, {framed.TRIGGER}" for scene in scenes]
    drawn = draw(engine, asked, ("it",))
    judged = [framed.is_right(scene, pixels) for scene, pixels in zip(scenes, drawn, strict=True)]
    told["concept"] = {name: share([j[name] for j in judged]) for name in judged[0]}
    right = sum(j["full"] for j in judged)
    told["concept, lower 95 % bound"] = round(wilson(right, len(judged)), 3)
    print(json.dumps(told, indent=2), flush=True)
    for name, used in (("class prompts without", ()), ("class prompts with", ("it",))):
        plain = draw(engine, [scene.caption for scene in scenes], used)
        told[name] = share([matches(s, p)["full"] for s, p in zip(scenes, plain, strict=True)])
    print(json.dumps(told, indent=2))


def train(folder: pathlib.Path, steps: int, threads: int, told: dict[str, object]) -> pathlib.Path:
    framed.write_data_set(folder / "pictures")
    adapter = folder / "framed.safetensors"
    words = [
        *(sys.executable, "-m", "calotype.serving", "train", "lora", str(folder / "pictures")),
        *("--trigger", framed.TRIGGER, "--class-word", framed.CLASS_WORD, "--holdout", "0"),
        *("--rights", "own", "--holder", "calotype", "-o", str(adapter)),
        *("--steps", str(steps), "--threads", str(threads)),
    ]
    began = time.monotonic()
    subprocess.run(words, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    told["training, wall seconds"] = round(time.monotonic() - began, 1)
    told["training, CPU seconds"] = round(used.ru_utime + used.ru_stime, 1)
    return adapter


def draw(
    engine: Engine, prompts: Sequence[str], adapters: Sequence[str]
) -> list[NDArray[np.uint8]]:
    """One picture of each at the model's own defaults."""
    defaults = local_model("shapes").spec.defaults
    size = ImageSize.parse(defaults.size)
    for number, prompt in enumerate(prompts):
        engine.add(
            GenerationRequest(
                id=str(number),
                prompt=prompt,
                size=size,
                rendered_size=size,
                sampling=SamplingParams(defaults.steps, defaults.guidance_scale, defaults.sampler),
                seed=number,
                adapters=tuple(AdapterRef(name, 1.0) for name in adapters),
            )
        )
    found: dict[int, NDArray[np.uint8]] = {}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                found[int(event.request_id)] = event.images[0]
    return [found[number] for number in range(len(prompts))]


def share(right: Sequence[bool]) -> float:
    return round(sum(right) / len(right), 3)


def wilson(right: int, count: int, z: float = 1.96) -> float:
    """Lower bound of Wilson's 95 % interval."""
    p = right / count
    middle = p + z * z / (2 * count)
    wide = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (middle - wide) / (1 + z * z / count)


if __name__ == "__main__":
    main()
