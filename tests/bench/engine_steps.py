"""What the engine adds to the denoiser's own work, whom it serves first, how soon it stops."""

from __future__ import annotations

import random
import statistics
import threading
import time
import weakref
from typing import Any

import torch
from engine_load import CONCURRENT, SIDE, Rows, draw, make_request, row, seconds

from calotype.serving.core.request import Failed, Finished, GenerationRequest
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.execution.forward import Forward
from calotype.serving.engine.model.components import Components
from calotype.serving.engine.model.decoder import pixels_per_token
from calotype.serving.engine.scheduling.scheduler import Bucket

LONG_STEPS, SHORT_STEPS = 28, 4
"""FLUX.2 [dev]'s usual steps, and those of a quick look."""


def denoiser_share(components: Components, rounds: int) -> Rows:
    """Time in the denoiser of all the time from eight requests to eight pictures.

    Their prompts were encoded before: in the service another process does it.
    """
    engine = Engine(components)

    def requests() -> list[GenerationRequest]:
        return [make_request(i, prompt="a red circle") for i in range(CONCURRENT)]

    draw(engine, requests())
    shares = []
    for _ in range(rounds):
        before = engine.denoiser_seconds
        taken = seconds(lambda: draw(engine, requests()))
        shares.append((engine.denoiser_seconds - before) / taken)
    value = 100 * statistics.median(shares)
    return {"time inside the denoiser at saturation": row(value, "% of wall time", 85.0, "higher")}


def first_image(components: Components, rounds: int) -> Rows:
    """A short request that arrives when eight long ones have begun.

    Against the same engine when it ends the long ones first, all eight of them together.
    """
    engine = Engine(components)

    def arrive() -> None:
        for i in range(CONCURRENT):
            engine.add(make_request(i, steps=LONG_STEPS))
        engine.step()
        engine.step()

    def short() -> None:
        engine.add(make_request(CONCURRENT, steps=SHORT_STEPS))
        while not any(
            isinstance(event, Finished) and event.request_id == f"r{CONCURRENT}"
            for event in engine.step()
        ):
            pass

    def rest() -> None:
        while engine.has_work:
            engine.step()

    def in_order() -> None:
        rest()
        short()

    found = []
    for turn in range(rounds + 1):
        arrive()
        ours = seconds(short)
        rest()
        arrive()
        theirs = seconds(in_order)
        if turn:
            found.append(theirs / ours)
    value = statistics.median(found)
    return {
        "first picture of a short request behind 8 long ones": row(
            value, "x sooner than first-in-first-out", 4.0, "higher"
        )
    }


def step_overhead(components: Components, rounds: int) -> Rows:
    """A step of the engine against the bare forward pass of as many pictures, side by side.

    The bar is that of a full batch. A picture alone is told without one: what the engine does then
    is a fixed third of a millisecond, which is some percent of a miniature's step only.
    """
    found: Rows = {}
    for rows, times, bar in ((CONCURRENT, rounds, 3.0), (1, 2 * rounds, None)):
        share, added = _overhead(components, rows, times)
        found[f"engine overhead per step of {_images(rows)}"] = row(
            100 * share, "% over the bare denoiser forward", bar, "lower"
        )
        found[f"the same in milliseconds, {_images(rows)}"] = row(1000 * added, "ms", None, "lower")
    return found


def _overhead(components: Components, rows: int, times: int) -> tuple[float, float]:
    engine = Engine(components)
    for i in range(rows):
        # The first steps and the last are not among the timed ones.
        engine.add(make_request(i, steps=times + 4))
    side = SIDE // pixels_per_token(components.vae)
    config, text = components.denoiser.config, components.settings.max_sequence_length
    bucket = Bucket(side, side, text)
    options: dict[str, Any] = {"device": components.device, "dtype": components.dtype}
    hidden = torch.randn(rows, side * side, config.in_channels, **options)
    embeds = torch.randn(rows, text, config.joint_attention_dim, **options)
    moments = torch.linspace(0.1, 0.9, rows, **options)
    guidance = (
        torch.full((rows,), 3.0, device=components.device) if config.guidance_embeds else None
    )
    forward = Forward(components.denoiser)

    @torch.inference_mode()
    def bare() -> None:
        forward(hidden, moments, guidance, embeds, bucket)
        _wait(components)

    def step() -> None:
        engine.step()
        _wait(components)

    for _ in range(2):
        step()
        bare()
    pairs = []
    for turn in range(times):
        if turn % 2:
            ours, theirs = seconds(step), seconds(bare)
        else:
            theirs, ours = seconds(bare), seconds(step)
        pairs.append((ours, theirs))
    while engine.has_work:
        engine.step()
    return (
        statistics.median(ours / theirs for ours, theirs in pairs) - 1,
        statistics.median(ours - theirs for ours, theirs in pairs),
    )


def abort_to_freed(components: Components, aborts: int) -> Rows:
    """Steps from an abort to the end of the request's memory, the running one among them.

    The abort comes from another thread at a random moment, also in the middle of a step.
    """
    chance = random.Random(1)
    engine = Engine(components)
    shape = components.settings.max_sequence_length, components.denoiser.config.joint_attention_dim
    worst, begun = 0, 0

    def abort(name: str, told: list[int], pause: float) -> None:
        time.sleep(pause)
        told.append(begun)
        engine.abort(name)

    for turn in range(aborts):
        for i in range(3):
            engine.add(make_request(i, steps=8))
        # Only the engine holds these, and only until the request is forgotten.
        embeds = torch.zeros(shape, device=components.device, dtype=components.dtype)
        held = weakref.ref(embeds)
        engine.add(make_request(100 + turn, steps=500), embeds)
        del embeds
        aborted_at: list[int] = []

        thread = threading.Thread(
            target=abort, args=(f"r{100 + turn}", aborted_at, chance.uniform(0.0, 0.1))
        )
        thread.start()
        ended = False
        while not ended:
            begun += 1
            events = engine.step()
            ended = any(isinstance(e, Failed) and e.request_id == f"r{100 + turn}" for e in events)
        thread.join()
        del events
        if held() is not None:
            raise RuntimeError("an aborted request still holds memory")
        # The step in which the abort came counts whole; one that begins with ending it does not.
        worst = max(worst, 1, begun - aborted_at[0])
        while engine.has_work:
            engine.step()
    return {"abort to freed": row(worst, "steps at the worst", 1, "lower")}


def _images(rows: int) -> str:
    return "1 picture" if rows == 1 else f"{rows} pictures"


def _wait(components: Components) -> None:
    if components.device.type == "cuda":
        torch.cuda.synchronize(components.device)
