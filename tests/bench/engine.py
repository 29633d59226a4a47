"""Benchmarks of the engine against diffusers' own pipeline, as ratios within one run.

Both sides draw the same requests, turn and turn about, so that a busy machine slows both. Run it
alone: ``python tests/bench/engine.py [MODEL_FOLDER]``; `tests/bench/run.py` calls `measure`.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import calotype.serving
from calotype.serving.engine.components import Components, load_components
from calotype.serving.engine.engine import Engine
from calotype.serving.request import (
    AdapterRef,
    Finished,
    GenerationRequest,
    ImageSize,
    SamplingParams,
)
from calotype.serving.testing_models import save_random_lora, save_tiny_flux2

STEPS = 20
SIDE = 128
CONCURRENT = 8
PROMPT = "a red circle on a blue background"
ADAPTERS = ("one", "two")


def measure(folder: pathlib.Path | str | None = None, rounds: int = 5) -> dict[str, dict[str, Any]]:
    """Name to {"value", "unit", "bar", "better"}.

    Args:
        folder: a diffusers-format model; the packaged one if None, or a tiny random one where the
            package has none.
        rounds: how often each pair is timed; medians count.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(scratch)
        model = pathlib.Path(folder) if folder is not None else _default_folder(place)
        components = load_components(model)
        pipeline = _pipeline(model, components)
        loras = {
            name: save_random_lora(components.denoiser, place / f"{name}.safetensors", seed=i)
            for i, name in enumerate(ADAPTERS)
        }
        return {
            "engine_latency_ratio": _latency(components, pipeline, rounds),
            "engine_throughput_ratio": _throughput(components, pipeline, loras, rounds),
            "engine_adapter_switch_ratio": _switching(components, pipeline, loras, rounds),
            "engine_denoiser_share": _denoiser_share(components, rounds),
        }


def _default_folder(scratch: pathlib.Path) -> pathlib.Path:
    packaged = pathlib.Path(calotype.serving.__file__).parent / "models" / "shapes"
    if (packaged / "model_index.json").is_file():
        return packaged
    return save_tiny_flux2(scratch / "tiny")


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
        vae=AutoencoderKLFlux2.from_pretrained(folder / "vae", torch_dtype=dtype),
        text_encoder=Mistral3ForConditionalGeneration.from_pretrained(
            folder / "text_encoder", dtype=dtype
        ),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        transformer=Flux2Transformer2DModel.from_pretrained(
            folder / "transformer", torch_dtype=dtype
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _request(number: int, adapters: tuple[AdapterRef, ...] = ()) -> GenerationRequest:
    return GenerationRequest(
        id=f"r{number}",
        prompt=PROMPT,
        size=ImageSize(SIDE, SIDE),
        rendered_size=ImageSize(SIDE, SIDE),
        sampling=SamplingParams(STEPS, 1.0 + number % 4),
        seed=number,
        adapters=adapters,
    )


def _draw(engine: Engine, requests: Sequence[GenerationRequest]) -> None:
    for request in requests:
        engine.add(request)
    finished = 0
    while engine.has_work:
        finished += sum(isinstance(event, Finished) for event in engine.step())
    assert finished == len(requests), "a request of the benchmark failed"


def _call(pipeline: Any, components: Components, number: int) -> None:
    settings = components.settings
    pipeline(
        prompt=PROMPT,
        width=SIDE,
        height=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=1.0 + number % 4,
        generator=torch.Generator("cpu").manual_seed(number),
        max_sequence_length=settings.max_sequence_length,
        text_encoder_out_layers=settings.text_encoder_out_layers,
    )


def _interleaved(
    ours: Callable[[], None], theirs: Callable[[], None], rounds: int
) -> tuple[float, float]:
    """Median seconds of each, after one round that is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for which, run in enumerate((ours, theirs)):
            started = time.perf_counter()
            run()
            if turn:
                times[which].append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def _row(value: float, unit: str, bar: float, better: str) -> dict[str, Any]:
    return {"value": round(value, 3), "unit": unit, "bar": bar, "better": better}


def _latency(components: Components, pipeline: Any, rounds: int) -> dict[str, Any]:
    engine = Engine(components)
    ours, theirs = _interleaved(
        lambda: _draw(engine, [_request(1)]), lambda: _call(pipeline, components, 1), rounds
    )
    return _row(ours / theirs, "x Flux2Pipeline's time", 1.10, "lower")


def _throughput(
    components: Components, pipeline: Any, loras: dict[str, pathlib.Path], rounds: int
) -> dict[str, Any]:
    """Eight concurrent requests, mixed seeds, guidance and adapters.

    The pipeline is spared its adapters, which it would have to load and set for each call.
    """
    engine = _with_adapters(components, loras)
    stacks = ((), (AdapterRef("one", 0.8),), (), (AdapterRef("one", 0.5), AdapterRef("two", 0.5)))
    requests = [_request(i, stacks[i % len(stacks)]) for i in range(CONCURRENT)]

    def one_by_one() -> None:
        for i in range(CONCURRENT):
            _call(pipeline, components, i)

    ours, theirs = _interleaved(lambda: _draw(engine, requests), one_by_one, rounds)
    engine.adapters.layers.remove()
    return _row(theirs / ours, "x Flux2Pipeline's images/s", 1.4, "higher")


def _switching(
    components: Components, pipeline: Any, loras: dict[str, pathlib.Path], rounds: int
) -> dict[str, Any]:
    """Another adapter for every request, without drawing anything on either side.

    Ours: taking the adapter from the store and preparing a batch of it, at a scale that no batch
    had before. Theirs: load_lora_weights and set_adapters.
    """
    engine = _with_adapters(components, loras)
    store, place = engine.adapters, 0

    def chosen(name: str, scale: float) -> float:
        started = time.perf_counter()
        adapter = store.acquire(name)
        assert adapter is not None, "the adapter was loaded before"
        with store.layers.applied([((adapter, scale),)]):
            seconds = time.perf_counter() - started
        store.release(adapter)
        return seconds

    def switched() -> float:
        nonlocal place
        place += 1
        path = loras[ADAPTERS[place % 2]]
        started = time.perf_counter()
        pipeline.load_lora_weights(
            str(path.parent), weight_name=path.name, adapter_name=f"a{place}"
        )
        pipeline.set_adapters([f"a{place}"], [0.8])
        seconds = time.perf_counter() - started
        pipeline.delete_adapters([f"a{place}"])
        return seconds

    ours: list[float] = []
    theirs: list[float] = []
    for turn in range(rounds + 1):
        mine, other = chosen(ADAPTERS[turn % 2], 0.5 + 0.01 * turn), switched()
        if turn:
            ours.append(mine)
            theirs.append(other)
    engine.adapters.layers.remove()
    pipeline.unload_lora_weights()
    ratio = statistics.median(theirs) / statistics.median(ours)
    return _row(ratio, "x faster", 5.0, "higher")


def _denoiser_share(components: Components, rounds: int) -> dict[str, Any]:
    engine = Engine(components)
    _draw(engine, [_request(i) for i in range(CONCURRENT)])
    shares = []
    for _ in range(rounds):
        before, started = engine.denoiser_seconds, time.perf_counter()
        _draw(engine, [_request(i) for i in range(CONCURRENT)])
        shares.append((engine.denoiser_seconds - before) / (time.perf_counter() - started))
    return _row(100 * statistics.median(shares), "% of wall time", 85.0, "higher")


def _with_adapters(components: Components, loras: dict[str, pathlib.Path]) -> Engine:
    engine = Engine(components)
    for name, path in loras.items():
        engine.adapters.load(name, path, wait=60)
    return engine


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1] if len(sys.argv) > 1 else None), indent=2))
