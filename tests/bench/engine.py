"""Benches of the engine, as ratios within one run: against diffusers' pipeline, and against itself.

Both sides draw the same requests, turn and turn about, so that a busy machine slows both. Run it
alone: ``python -P tests/bench/engine.py [MODEL_FOLDER]``; `tests/bench/run.py` calls `measure`. It
takes the first CUDA device if there is one.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import torch

sys.path.append(str(pathlib.Path(__file__).parent))

from engine_load import (
    ADAPTERS,
    CONCURRENT,
    SIDE,
    STEPS,
    Rows,
    default_device,
    default_folder,
    draw,
    guidance_of,
    make_request,
    new_prompt,
    random_loras,
    ratio,
    row,
    seconds,
    with_adapters,
)
from engine_soak import soak
from engine_steps import abort_to_freed, denoiser_share, first_image, step_overhead

from calotype.serving.core.request import AdapterRef
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.model.components import Components, load_components


def measure(
    folder: pathlib.Path | str | None = None, rounds: int = 9, device: str | None = None
) -> Rows:
    """Every row of the engine.

    Args:
        folder: a diffusers-format model; the packaged one if None, or a tiny random one where the
            package has none.
        rounds: how often each pair is timed; medians count.
    """
    if (device := device or default_device()) == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(scratch)
        model = pathlib.Path(folder) if folder is not None else default_folder(place)
        components = load_components(model, device=device)
        pipeline = _pipeline(model, components)
        loras = random_loras(components, place)
        return {
            **_throughput(components, pipeline, loras, rounds),
            **_latency(components, pipeline, 2 * rounds),
            **_switching(components, pipeline, loras, rounds),
            **denoiser_share(components, rounds),
            **first_image(components, max(3, rounds // 3)),
            **step_overhead(components, 12 * rounds),
            **abort_to_freed(components, 5 * rounds),
            **soak(components, place),
        }


def _pipeline(folder: pathlib.Path, components: Components) -> Any:
    """diffusers' pipeline with weights of its own: PEFT changes the modules it loads into."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

    dtype = components.dtype
    pipeline = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLFlux2.from_pretrained(folder / "vae", dtype=dtype),
        text_encoder=Mistral3ForConditionalGeneration.from_pretrained(
            folder / "text_encoder", dtype=dtype
        ),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        transformer=Flux2Transformer2DModel.from_pretrained(folder / "transformer", dtype=dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(components.device)


def _call(pipeline: Any, components: Components, number: int) -> None:
    settings = components.settings
    pipeline(
        prompt=new_prompt(),
        width=SIDE,
        height=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=guidance_of(number),
        generator=torch.Generator("cpu").manual_seed(number),
        max_sequence_length=settings.max_sequence_length,
        text_encoder_out_layers=settings.text_encoder_out_layers,
    )


def _latency(components: Components, pipeline: Any, rounds: int) -> Rows:
    """One request from its prompt to its pixels, with a new prompt each time."""
    engine = Engine(components)
    found = ratio(
        lambda: draw(engine, [make_request(1)]), lambda: _call(pipeline, components, 1), rounds
    )
    return {"latency of one request": row(found, "x Flux2Pipeline", 1.05, "lower")}


def _throughput(
    components: Components, pipeline: Any, loras: dict[str, pathlib.Path], rounds: int
) -> Rows:
    """Eight concurrent requests with new prompts, mixed seeds, guidance and adapters.

    The pipeline is spared its adapters, which it would have to load and set for each call.
    """
    stacks = ((), (AdapterRef("one", 0.8),), (), (AdapterRef("one", 0.5), AdapterRef("two", 0.5)))

    def one_by_one() -> None:
        for i in range(CONCURRENT):
            _call(pipeline, components, i)

    with with_adapters(components, loras) as engine:
        found = ratio(
            lambda: draw(
                engine,
                [make_request(i, adapters=stacks[i % len(stacks)]) for i in range(CONCURRENT)],
            ),
            one_by_one,
            rounds,
        )
    return {"images/s of 8 concurrent requests": row(1 / found, "x Flux2Pipeline", 1.4, "higher")}


def _switching(
    components: Components, pipeline: Any, loras: dict[str, pathlib.Path], rounds: int
) -> Rows:
    """Another adapter for every request, without drawing anything on either side.

    Ours: taking an adapter from the store and preparing a batch of it, at a scale that no batch
    had before; and reading it from its file, which the engine does beside the drawing. Theirs:
    load_lora_weights and set_adapters.
    """
    turn = 0
    with with_adapters(components, loras) as engine:
        store = engine.adapters

        def chosen() -> None:
            adapter = store.acquire(ADAPTERS[turn % 2])
            if adapter is None:
                raise RuntimeError("the adapter was loaded before")
            with store.layers.applied([((adapter, 0.5 + 0.01 * turn),)]):
                store.release(adapter)

        def read() -> None:
            store.load(f"new{turn}", loras[ADAPTERS[turn % 2]], wait=60)

        def switched() -> None:
            path = loras[ADAPTERS[turn % 2]]
            pipeline.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=f"a{turn}"
            )
            pipeline.set_adapters([f"a{turn}"], [0.8])

        held, fresh = [], []
        for turn in range(rounds + 1):
            ours, disk, theirs = seconds(chosen), seconds(read), seconds(switched)
            pipeline.delete_adapters([f"a{turn}"])
            store.unload(f"new{turn}")
            if turn:
                held.append(theirs / ours)
                fresh.append(theirs / disk)
    pipeline.unload_lora_weights()
    return {
        "another adapter for every request": row(
            statistics.median(held), "x faster than load_lora_weights + set_adapters", 5.0, "higher"
        ),
        "an adapter read from its file": row(
            statistics.median(fresh),
            "x faster than load_lora_weights + set_adapters",
            None,
            "higher",
        ),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1] if len(sys.argv) > 1 else None), indent=2))
