"""The first-block step cache: the time it saves, and by how much its pictures differ."""

from __future__ import annotations

import pathlib
import statistics
import sys
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

sys.path.append(str(pathlib.Path(__file__).parent))

from engine_load import Rows, default_device, default_folder, make_request, row, seconds

from calotype.serving.core.request import Finished, GenerationRequest
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.model.components import load_components

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

THRESHOLDS = (0.05, 0.1, 0.2, 0.4)
IMAGES = 16


def measure(device: str | None = None, pictures: int = IMAGES) -> Rows:
    """For each threshold the speed, the steps left out and the difference of the pictures.

    Every prompt is drawn without the cache and with it, one after the other.
    """
    if (device := device or default_device()) == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        components = load_components(default_folder(pathlib.Path(scratch)), device=device)
        engine = Engine(components)
        found: Rows = {}
        _draw(engine, make_request(0))
        for threshold in THRESHOLDS:
            faster, skipped, differences = [], [], []
            for number in range(pictures):
                request = make_request(number)
                sampling = replace(request.sampling, step_cache=threshold)
                whole, plain = _draw(engine, request)
                taken, cached = _draw(engine, replace(request, sampling=sampling))
                faster.append(whole / taken)
                skipped.append(cached.skipped / cached.evaluations)
                differences.append(_difference(plain.images[0], cached.images[0]))
            name = f"step cache {threshold:g}"
            found |= {
                f"{name}, speed of a picture": row(
                    statistics.median(faster), "x without it", None, "higher"
                ),
                f"{name}, steps left out": row(
                    100 * statistics.mean(skipped), "% of them", None, "higher"
                ),
                f"{name}, mean difference of a channel": row(
                    statistics.mean(differences), "of 255", None, "lower"
                ),
            }
        return found


def _draw(engine: Engine, request: GenerationRequest) -> tuple[float, Finished]:
    engine.add(request)
    endings: list[Finished] = []

    def run() -> None:
        while engine.has_work:
            endings.extend(event for event in engine.step() if isinstance(event, Finished))

    taken = seconds(run)
    return taken, endings[0]


def _difference(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean())
