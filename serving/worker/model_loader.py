"""A model on its device or devices, ready to draw: what a manifest asks for, as an engine."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calotype.serving.config import ImageModel, bytes_of
from calotype.serving.core.errors import ModelLoadFailed
from calotype.serving.core.request import Failed, GenerationRequest, ImageSize, SamplingParams
from calotype.serving.weights.sources import model_folder

if TYPE_CHECKING:
    from calotype.serving.engine.engine import Engine
    from calotype.serving.engine.execution.step_profile import Profile
    from calotype.serving.engine.model.components import Components, Part
    from calotype.serving.engine.parallel.device_group import DeviceGroup
    from calotype.serving.engine.parallel.sequence_parallel import SequenceGroup

COMPILER = "inductor"
ROWS_UNMEASURED = 8
"""Passes that share a step at most on a machine without a profile."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An engine, and the group if several devices draw each picture.

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

    def state(self) -> dict[str, Any]:
        """JSON, with the names of the wire: how it draws."""
        components = self.engine.components
        return {
            "device": str(components.device),
            "precision": components.precision,
            "devicesPerPicture": self.engine.devices,
            "compiled": self.compiled,
            "rowsPerStep": self.rows,
            "profiled": self.profiled,
        }


def load_model(
    model: ImageModel,
    *,
    torch_threads: int | None = None,
    data_folder: pathlib.Path | None = None,
    on_lost: Callable[[str], None] = lambda reason: None,
    parts: Sequence[Part] = ("denoiser", "vae"),
) -> LoadedModel:
    """Loads what a manifest names, and compiles it where it says so. Takes seconds to minutes.

    Args:
        data_folder: where `calotype profile` may have left what it measured.
        on_lost: told, from any thread, when a device of a group is gone.

    Raises:
        ModelLoadFailed: it cannot be loaded as the manifest says; one sentence.
    """
    import torch

    from calotype.serving.engine.execution.step_profile import Profile
    from calotype.serving.engine.model.components import load_components
    from calotype.serving.engine.parallel.device_group import DeviceGroup

    folder, device = model_folder(model), pick_device(model.spec.device)
    if torch_threads is not None:
        torch.set_num_threads(torch_threads)
    devices = model.spec.acceleration.devices_per_picture
    group = None
    if devices > 1:
        # The other devices load while this one does.
        group = DeviceGroup(
            folder,
            devices,
            device=device,
            precision=model.spec.precision,
            torch_threads=torch_threads,
            max_rank=model.spec.adapters.max_rank,
            adapter_bytes=bytes_of(model.spec.adapters.memory_budget),
            on_lost=on_lost,
        )
    try:
        components = load_components(
            folder, parts=parts, device=device, precision=model.spec.precision
        )
        profile = None if data_folder is None else Profile.find(data_folder, components)
        joined = None if group is None else group.join()
        return _ready(model, components, profile, group, joined)
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
) -> LoadedModel:
    from calotype.serving.engine.engine import Engine
    from calotype.serving.engine.lora.adapter_store import AdapterStore

    compiled = model.spec.acceleration.compile
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
