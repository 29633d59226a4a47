"""What judging costs: the embedded safety stage on prompts and pictures, one at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from calotype.moderation.moderator import Moderator

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black")
SUBJECTS = (
    "a lighthouse on a cliff at dawn, oil painting",
    "product photo of a ceramic teapot on a wooden table, soft light, shallow depth of field",
    "an old fisherman mending a net in a harbour, portrait, 35mm, natural light, highly detailed",
    "isometric drawing of a small town in winter with a railway station and people on the platform",
)


def measure() -> dict[str, dict[str, Any]]:
    """name -> value, unit, bar, better."""
    stage = Moderator.load()
    stage.warm_up()
    prompts = [f"{colour} light, {subject}" for colour in COLOURS for subject in SUBJECTS] * 4
    # Numbered: the embedding remembers prompts that it has seen.
    prompt_seconds = timed(
        stage.judge_prompt, [f"{prompt} ({i})" for i, prompt in enumerate(prompts)]
    )
    rng = np.random.default_rng(0)
    small = [noise(rng, 128) for _ in range(20)]
    suspicious = [noise(rng, 1024) for _ in range(8)]
    return {
        "judging a prompt, p50": entry(statistics.median(prompt_seconds), 40),
        "judging a prompt, p99": entry(float(np.quantile(prompt_seconds, 0.99)), 150),
        "judging a 128x128 picture, p50": entry(
            statistics.median(timed(stage.judge_image, small)), None
        ),
        "judging a 1024x1024 photograph, p50": entry(
            statistics.median(timed(stage.judge_image, photographs(1024))), 400
        ),
        "judging a 1024x1024 picture that gets a closer look, p50": entry(
            statistics.median(timed(stage.judge_image, suspicious)), None
        ),
    }


def noise(rng: np.random.Generator, side: int) -> Any:
    """A picture of soft blobs: no tile is blank, and large ones are suspicious to a classifier."""
    coarse = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((side // 16, side // 16, 1), dtype=np.uint8))


def photographs(side: int) -> list[Any]:
    """Six squares of the two photographs that come with scikit-learn."""
    found = []
    for name in ("china.jpg", "flower.jpg"):
        whole = Image.fromarray(load_sample_image(name))
        for left in (0, (whole.width - whole.height) // 2, whole.width - whole.height):
            square = whole.crop((left, 0, left + whole.height, whole.height))
            found.append(np.asarray(square.resize((side, side), Image.Resampling.LANCZOS)))
    return found


def timed(judge: Callable[[Any], Any], inputs: Sequence[Any]) -> list[float]:
    """Seconds of every judgement."""
    found = []
    for given in inputs:
        begun = time.perf_counter()
        judge(given)
        found.append(time.perf_counter() - begun)
    return found


def entry(seconds: float, bar: float | None) -> dict[str, Any]:
    return {"value": round(1000 * seconds, 1), "unit": "ms", "bar": bar, "better": "lower"}
