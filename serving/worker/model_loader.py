"""From a manifest to a loaded model: the one place where weights become components and engines."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calotype.serving.config import ImageModel, bytes_of
from calotype.serving.core.errors import ModelLoadFailed
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.request import Failed, GenerationRequest, ImageSize, SamplingParams
from calotype.serving.weights.sources import model_folder

if TYPE_CHECKING:
    from calotype.serving.engine.engine import Engine
    from calotype.serving.engine.execution.step_profile import Profile
    from calotype.serving.engine.model.components import Components, Part
    from calotype.serving.engine.model.text_encoder import TextEncoder
    from calotype.serving.engine.parallel.device_group import DeviceGroup
    from calotype.serving.engine.parallel.sequence_parallel import SequenceGroup

COMPILER = "inductor"
ROWS_UNMEASURED = 8
"""Passes that share a step at most on a machine without a profile."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """How a replica draws."""

    device: str
    precision: str
    devices: int
    """That draw each image together."""
    compiled: bool
    rows: int
    """Passes that share a step at most."""
    profiled: bool
    """Whether `calotype profile` said so."""

    def to_payload(self) -> JsonObject:
        """As the status of a model shows it."""
        return {
            "device": self.device,
            "precision": self.precision,
            "devicesPerPicture": self.devices,
            "compiled": self.compiled,
            "rowsPerStep": self.rows,
            "profiled": self.profiled,
        }


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An engine, and the group if several devices draw each image.

    Attributes:
        rows: passes that share a step at most.
        profiled: whether `calotype profile` said so.
    """

    engine: Engine
    group: DeviceGroup | None
    rows: int
    profiled: bool
    compiled: bool

    @property
    def lost(self) -> bool:
        """Whether a device of the group is gone, so that nothing can be drawn any more."""
        return self.group is not None and bool(self.group.lost)

    def close(self) -> None:
        """Ends the group's processes; the engine must not be stepped any more."""
        if self.group is not None:
            self.group.close()

    def state(self) -> EngineState:
        components = self.engine.components
        return EngineState(
            device=str(components.device),
            precision=components.precision,
            devices=self.engine.devices,
            compiled=self.compiled,
            rows=self.rows,
            profiled=self.profiled,
        )


def load_parts(
    model: ImageModel, parts: Sequence[Part], *, torch_threads: int | None = None
) -> Components:
    """Loads some parts of what a manifest names, fetching them first if they lie elsewhere.

    Args:
        torch_threads: of this process from now on; None leaves them as they are.

    Raises:
        ModelLoadFailed: they cannot be loaded as the manifest says; one sentence.
    """
    import torch

    from calotype.serving.engine.model.components import load_components

    if torch_threads is not None:
        torch.set_num_threads(torch_threads)
    return load_components(
        model_folder(model),
        parts=parts,
        device=pick_device(model.spec.device),
        precision=model.spec.precision,
    )


def load_text_encoder(model: ImageModel, *, torch_threads: int | None = None) -> TextEncoder:
    """The text encoder of a manifest's model, alone.

    Raises:
        ModelLoadFailed: as `load_parts`.
    """
    found = load_parts(model, ("text_encoder",), torch_threads=torch_threads).text_encoder
    assert found is not None, "it was asked for"
    return found


def load_model(
    model: ImageModel,
    *,
    torch_threads: int | None = None,
    data_folder: pathlib.Path | None = None,
    on_lost: Callable[[str], None] = lambda reason: None,
    parts: Sequence[Part] = ("denoiser", "vae"),
    accelerated: bool = True,
) -> LoadedModel:
    """Loads what a manifest names, and compiles it where it says so. Takes seconds to minutes.

    Args:
        data_folder: where `calotype profile` may have left what it measured.
        on_lost: called, from any thread, when a device of a group is gone.
        accelerated: compile and use several devices as the manifest says; else neither, for
            processes that draw a single image.

    Raises:
        ModelLoadFailed: it cannot be loaded as the manifest says; one sentence.
    """
    from calotype.serving.engine.execution.step_profile import Profile
    from calotype.serving.engine.parallel.device_group import DeviceGroup

    devices = model.spec.acceleration.devices_per_picture if accelerated else 1
    group = None
    if devices > 1:
        # The other devices load while this one does.
        group = DeviceGroup(
            model_folder(model),
            devices,
            device=pick_device(model.spec.device),
            precision=model.spec.precision,
            torch_threads=torch_threads,
            max_rank=model.spec.adapters.max_rank,
            adapter_bytes=bytes_of(model.spec.adapters.memory_budget),
            on_lost=on_lost,
        )
    try:
        components = load_parts(model, parts, torch_threads=torch_threads)
        profile = None if data_folder is None else Profile.find(data_folder, components)
        joined = None if group is None else group.join()
        compiled = accelerated and model.spec.acceleration.compile
        return _ready(model, components, profile, group, joined, compiled)
    except BaseException:
        if group is not None:
            group.close()
        raise


def _ready(
    model: ImageModel,
    components: Components,
    profile: Profile | None,
    group: DeviceGroup | None,
    joined: SequenceGroup | None,
    compiled: bool,
) -> LoadedModel:
    from calotype.serving.engine.control.control_store import ControlStore
    from calotype.serving.engine.engine import Engine
    from calotype.serving.engine.lora.adapter_store import AdapterStore

    rows = ROWS_UNMEASURED if profile is None else profile.most_rows
    engine = Engine(
        components,
        max_batch_rows=rows,
        profile=profile,
        adapters=AdapterStore(
            components.denoiser,
            max_rank=model.spec.adapters.max_rank,
            budget_bytes=bytes_of(model.spec.adapters.memory_budget),
            cpu_budget_bytes=bytes_of(model.spec.adapters.host_memory_budget),
        ),
        controls=ControlStore(
            components.denoiser, budget_bytes=bytes_of(model.spec.adapters.memory_budget)
        ),
        compiler=COMPILER if compiled else None,
        group=joined,
    )
    if compiled:
        _draw_once(engine, model)
    return LoadedModel(engine, group, rows, profile is not None, compiled)


def _draw_once(engine: Engine, model: ImageModel) -> None:
    """One step of the model's usual size, so that the first request does not wait for a compiler.

    Raises:
        ModelLoadFailed: the blocks cannot be compiled on this machine.
    """
    import torch

    config, settings = engine.components.denoiser.config, engine.components.settings
    size = ImageSize.parse(model.spec.defaults.size)
    embeds = torch.zeros(settings.max_sequence_length, config.joint_attention_dim)
    request = GenerationRequest(
        "warm-up", "", size, model.spec.check_size(size), SamplingParams(1, 4.0), seed=0
    )
    engine.add(request, embeds, negative=embeds)
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise ModelLoadFailed(
                    f"The denoiser cannot be compiled on this machine: {event.error.message} Set "
                    "acceleration.compile to false, or build the image with a C++ compiler.",
                    param="compile",
                )


def pick_device(wanted: str) -> str:
    """``auto`` is the first CUDA device if there is one, else the CPU."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
