"""What the engine's benches draw: the model, requests that differ, and pairs timed in turn."""

from __future__ import annotations

import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import calotype.serving
from calotype.serving.core.request import (
    AdapterRef,
    Finished,
    GenerationRequest,
    ImageSize,
    SamplingParams,
)
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.model.components import Components
from calotype.serving.testing.models import save_random_lora, save_tiny_flux2

STEPS = 20
SIDE = 128
CONCURRENT = 8
ADAPTERS = ("one", "two")

_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
_SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
_PROMPTS = itertools.cycle(
    f"a {colour} {shape} on a {ground} background"
    for colour, ground, shape in itertools.product(_COLOURS, _COLOURS, _SHAPES)
)

Rows = dict[str, dict[str, Any]]
"""Name of a measure to {"value", "unit", "bar", "better"}."""


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_folder(scratch: pathlib.Path) -> pathlib.Path:
    """The packaged model, or a tiny random one where the package has none."""
    packaged = pathlib.Path(calotype.serving.__file__).parent / "weights" / "embedded" / "shapes"
    if (packaged / "model_index.json").is_file():
        return packaged
    return save_tiny_flux2(scratch / "tiny")


def random_loras(components: Components, scratch: pathlib.Path) -> dict[str, pathlib.Path]:
    return {
        name: save_random_lora(components.denoiser, scratch / f"{name}.safetensors", seed=i)
        for i, name in enumerate(ADAPTERS)
    }


@contextmanager
def with_adapters(components: Components, loras: dict[str, pathlib.Path]) -> Iterator[Engine]:
    engine = Engine(components)
    for name, path in loras.items():
        engine.adapters.load(name, path, wait=60)
    try:
        yield engine
    finally:
        engine.adapters.layers.remove()


def new_prompt() -> str:
    """One that was not drawn for the last 500 requests, so that it is in no cache."""
    return next(_PROMPTS)


def make_request(
    number: int,
    *,
    prompt: str | None = None,
    steps: int = STEPS,
    adapters: tuple[AdapterRef, ...] = (),
) -> GenerationRequest:
    return GenerationRequest(
        id=f"r{number}",
        prompt=new_prompt() if prompt is None else prompt,
        size=ImageSize(SIDE, SIDE),
        rendered_size=ImageSize(SIDE, SIDE),
        sampling=SamplingParams(steps, guidance_of(number)),
        seed=number,
        adapters=adapters,
    )


def guidance_of(number: int) -> float:
    return 1.0 + number % 4


def draw(engine: Engine, requests: Sequence[GenerationRequest]) -> None:
    for request in requests:
        engine.add(request)
    finished = 0
    while engine.has_work:
        finished += sum(isinstance(event, Finished) for event in engine.step())
    if finished != len(requests):
        raise RuntimeError("a request of the benchmark failed")


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> float:
    """Our time over theirs: the median over pairs that are timed side by side.

    Who is first changes from pair to pair; one pair before them is not counted.
    """
    found = []
    for turn in range(rounds + 1):
        if turn % 2:
            mine, other = seconds(ours), seconds(theirs)
        else:
            other, mine = seconds(theirs), seconds(ours)
        if turn:
            found.append(mine / other)
    return statistics.median(found)


def row(value: float, unit: str, bar: float | None, better: str) -> dict[str, Any]:
    return {"value": round(value, 3), "unit": unit, "bar": bar, "better": better}
