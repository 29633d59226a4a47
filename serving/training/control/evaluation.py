"""How well a control branch obeys: held-out maps through the serving engine, read back exactly."""

from __future__ import annotations

import collections
import io
import json
import pathlib
import random
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calotype.serving.core.conditions import ControlRef
from calotype.serving.core.request import (
    Failed,
    Finished,
    GenerationRequest,
    ImageSize,
    SamplingParams,
)
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.model.components import load_components
from calotype.serving.training.control.layouts import (
    KINDS,
    Layout,
    control_map,
    picture,
    sample_layout,
)
from calotype.serving.training.control.obedience import QUALITIES, obedience
from calotype.serving.training.flow import BEST_GUIDANCE
from calotype.serving.training.scenes import to_uint8
from calotype.serving.training.shapes import save_sheet

if TYPE_CHECKING:
    import argparse

    from calotype.serving.core.request import Pixels

NAME = "layout"


@dataclass(frozen=True, slots=True)
class Case:
    """A held-out map: what it shows, its kind, and its file."""

    layout: Layout
    kind: str
    file: bytes


def held_out(count: int, seed: int, anywhere: float, kinds: tuple[str, ...] = KINDS) -> list[Case]:
    """Maps that training never saw; kinds take turns.

    Args:
        anywhere: share of them whose things stand at no place of the captions.
    """
    rng = random.Random(seed)
    cases = []
    for place in range(count):
        kind = kinds[place % len(kinds)]
        layout = sample_layout(rng, True, kind, anywhere=anywhere)
        drawn = to_uint8(control_map(layout, kind).unsqueeze(0))[0].numpy()
        cases.append(Case(layout, kind, _png(drawn)))
    return cases


def draw(
    engine: Engine,
    cases: list[Case],
    *,
    scale: float = 1.0,
    end: float = 1.0,
    steps: int = 20,
    seed: int = 0,
) -> list[Pixels]:
    """A picture after each map; picture i has the seed ``seed + i``."""
    found: dict[str, Pixels] = {}
    for place, case in enumerate(cases):
        size = ImageSize(case.layout.width, case.layout.height)
        request = GenerationRequest(
            str(place),
            case.layout.caption,
            size,
            size,
            SamplingParams(steps, BEST_GUIDANCE),
            seed + place,
            controls=(ControlRef(NAME, "map", scale=scale, end=end),) if scale else (),
        )
        engine.add(request, files={"map": case.file})
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                found[event.request_id] = event.images[0]
                print(f"\r{len(found)} of {len(cases)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [found[str(place)] for place in range(len(cases))]


def evaluate(arguments: argparse.Namespace) -> None:
    """Prints the share of pictures with each quality, by kind of map."""
    engine = Engine(load_components(arguments.model))
    engine.controls.load(NAME, arguments.branch, wait=60)
    cases = held_out(arguments.maps, arguments.seed, arguments.anywhere)
    pictures = draw(engine, cases, scale=arguments.scale, end=arguments.end, steps=arguments.steps)
    by: dict[str, list[dict[str, bool]]] = collections.defaultdict(list)
    for case, image in zip(cases, pictures, strict=True):
        right = obedience(case.layout, image)
        by[case.kind].append(right)
        by["all"].append(right)
    scores = {
        kind: {name: sum(r[name] for r in rights) / len(rights) for name in QUALITIES}
        for kind, rights in by.items()
    }
    if arguments.sheet:
        _save_sheet(cases, pictures, arguments.sheet)
    if arguments.json:
        print(json.dumps(scores))
        return
    print(
        f"{len(cases)} held-out maps, scale {arguments.scale:g}, end {arguments.end:g}, "
        f"{arguments.steps} steps:"
    )
    print("  " + " ".join(f"{name:>10}" for name in ("", *QUALITIES)))
    for kind, found in scores.items():
        print(f"  {kind:>12}" + " ".join(f"{100 * found[n]:9.1f}%" for n in QUALITIES))


def _save_sheet(cases: list[Case], pictures: list[Pixels], path: pathlib.Path) -> None:
    """Rows of eight: maps, what training would have wanted, what was drawn."""
    import numpy as np
    from PIL import Image

    images: list[Pixels] = []
    for start in range(0, min(32, len(cases)) // 8 * 8, 8):
        part = cases[start : start + 8]
        images += [np.asarray(Image.open(io.BytesIO(case.file))) for case in part]
        images += [to_uint8(picture(case.layout).unsqueeze(0))[0].numpy() for case in part]
        images += pictures[start : start + 8]
    save_sheet(images, path)


def _png(pixels: Pixels) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
