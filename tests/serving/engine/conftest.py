"""Fixtures of the engine's tests: a tiny random FLUX.2, the pipeline it must equal, requests."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from calotype.serving.core.request import (
    AdapterRef,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    ImageSize,
    SamplingParams,
)
from calotype.serving.engine.engine import Engine
from calotype.serving.engine.model.components import Components, load_components
from calotype.serving.testing.models import MAX_SEQUENCE_LENGTH, OUT_LAYERS, save_tiny_flux2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What compares with diffusers is slow: importing it takes 20 s of CPU."""
    for item in items:
        if {"oracle", "load_oracle"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    # The cores are shared: two OpenMP threads that wait for each other are slower than one.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_flux2(tmp_path_factory.mktemp("model") / "dev")


@pytest.fixture(scope="session")
def components(model_folder: pathlib.Path) -> Components:
    return load_components(model_folder)


@pytest.fixture(scope="session")
def load_oracle() -> Callable[[pathlib.Path], Any]:
    return _load_oracle


@pytest.fixture(scope="session")
def oracle(model_folder: pathlib.Path) -> Any:
    return _load_oracle(model_folder)


@pytest.fixture(scope="session")
def draw_with() -> Callable[..., np.ndarray]:
    return _draw_with


@pytest.fixture(scope="session")
def make_request() -> Callable[..., GenerationRequest]:
    return _make_request


def _load_oracle(folder: pathlib.Path) -> Any:
    """diffusers' own pipeline on a folder, loaded by diffusers' and transformers' own loaders."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )
    from transformers import (
        Mistral3ForConditionalGeneration,
        PreTrainedTokenizerFast,
        Qwen3ForCausalLM,
    )

    klein = "Klein" in (folder / "model_index.json").read_text()
    text = Qwen3ForCausalLM if klein else Mistral3ForConditionalGeneration
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        "vae": AutoencoderKLFlux2.from_pretrained(folder / "vae"),
        "text_encoder": text.from_pretrained(folder / "text_encoder"),
        "tokenizer": PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        "transformer": Flux2Transformer2DModel.from_pretrained(folder / "transformer"),
    }
    if klein:
        distilled = json.loads((folder / "model_index.json").read_text())["is_distilled"]
        pipeline = Flux2KleinPipeline(**parts, is_distilled=distilled)
    else:
        pipeline = Flux2Pipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _draw_with(
    pipeline: Any,
    *,
    prompt: str = "a red circle on a blue background",
    size: tuple[int, int] = (64, 64),
    steps: int = 4,
    guidance: float = 3.0,
    seed: int = 7,
    **other: Any,
) -> np.ndarray:
    """One image of diffusers' pipeline: float32 [height, width, 3] in 0..1."""
    images = pipeline(
        prompt=prompt,
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        text_encoder_out_layers=OUT_LAYERS,
        output_type="np",
        **other,
    ).images
    return np.asarray(images[0])


def _make_request(
    request_id: str = "r",
    *,
    prompt: str = "a red circle on a blue background",
    size: tuple[int, int] = (64, 64),
    steps: int = 4,
    guidance: float = 3.0,
    seed: int = 7,
    sampler: str = "flow-euler",
    sigmas: tuple[float, ...] = (),
    true_guidance: float | None = None,
    step_cache: float = 0.0,
    adapters: tuple[AdapterRef, ...] = (),
    **other: Any,
) -> GenerationRequest:
    return GenerationRequest(
        id=request_id,
        prompt=prompt,
        size=ImageSize(*size),
        rendered_size=ImageSize(*size),
        sampling=SamplingParams(steps, guidance, sampler, sigmas, true_guidance, step_cache),
        seed=seed,
        adapters=adapters,
        **other,
    )


class Drawn:
    """What an engine did: its events, and the images before they were rounded to uint8."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.floats: dict[tuple[str, int], np.ndarray] = {}
        self.latents: dict[tuple[str, int], torch.Tensor] = {}

    def of(self, kind: type, request_id: str) -> list[Any]:
        return [e for e in self.events if isinstance(e, kind) and e.request_id == request_id]

    def ending(self, request_id: str) -> Finished | Failed:
        found = [*self.of(Finished, request_id), *self.of(Failed, request_id)]
        assert len(found) == 1, f"{request_id} has {len(found)} terminal events"
        return found[0]

    def image(self, request_id: str, index: int = 0) -> np.ndarray:
        ending = self.ending(request_id)
        assert isinstance(ending, Finished), ending
        return self.floats[request_id, index]


class WatchedEngine(Engine):
    """An engine that also keeps each image as the VAE gave it, before rounding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drawn = Drawn()
        self.batches: list[int] = []
        run = self._runner._run

        def watched(rows: Any, bucket: Any, outcome: Any) -> None:
            self.batches.append(len(rows))
            run(rows, bucket, outcome)

        self._runner._run = watched  # type: ignore[method-assign]
        decoded = self._delivery._decoded

        def kept(row: Any, grid: Any) -> Any:
            pixels = decoded(row, grid)
            floats = self._decoder.decode_float(row.latents.unsqueeze(0), grid)
            self.drawn.floats[row.request_id, row.index] = floats[0]
            self.drawn.latents[row.request_id, row.index] = row.latents.clone()
            return pixels

        self._delivery._decoded = kept  # type: ignore[method-assign]

    def step(self) -> list[Event]:
        events = super().step()
        self.drawn.events += events
        return events

    def run(self) -> Drawn:
        for _ in range(10_000):
            if not self.has_work:
                return self.drawn
            self.step()
        raise AssertionError("the engine does not come to an end")


@pytest.fixture
def new_engine(components: Components) -> Callable[..., WatchedEngine]:
    """Engines on the session's model; ``components`` and keywords may be given."""

    def build(own: Components | None = None, **kwargs: Any) -> WatchedEngine:
        return WatchedEngine(own or components, **kwargs)

    return build


@pytest.fixture
def engine(new_engine: Callable[..., WatchedEngine]) -> WatchedEngine:
    return new_engine()
