"""What fits on which GPU: the memory plan behind `calotype plan`.

Parameters are counted; activations are estimates, said to be so where they are printed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.engine.sizing.model_sizes import ModelSizes, measure_model, weight_bytes
from calotype.serving.engine.sizing.parameters import PartSize

TextEncoderPlace = Literal["same", "separate"]
PlanPrecision = Literal["float32", "bfloat16", "int8"]

GB = 1e9
_PRECISIONS = ("float32", "bfloat16", "int8")
RUNTIME_BYTES = 1.5 * GB
"""CUDA context, cuBLAS workspaces and what the allocator leaves unused: an estimate."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU model.

    Attributes:
        memory: bytes that a process can use, a little less than the name says.
        fp8: whether its tensor cores multiply fp8 numbers.
    """

    name: str
    memory: float
    fp8: bool


def _gpu(name: str, usable_gib: float, fp8: bool) -> Gpu:
    return Gpu(name, usable_gib * 1024**3, fp8)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a10-24gb", 22.0, False),
        _gpu("l4-24gb", 22.0, True),
        _gpu("rtx-3090-24gb", 23.5, False),
        _gpu("rtx-4090-24gb", 23.5, True),
        _gpu("rtx-5090-32gb", 31.3, True),
        _gpu("a100-40gb", 39.4, False),
        _gpu("l40s-48gb", 44.4, True),
        _gpu("a100-80gb", 79.1, False),
        _gpu("h100-80gb", 79.1, True),
        _gpu("h200-141gb", 139.8, True),
        _gpu("b200-192gb", 178.0, True),
    )
}


@dataclass(frozen=True, slots=True)
class PlanItem:
    """One line of the table; ``where`` is "denoiser GPU" or "text encoder GPU"."""

    name: str
    where: str
    bytes: float
    parameters: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What goes where, and what stays free."""

    model: str
    gpu: Gpu
    precision: PlanPrecision
    text_encoder: TextEncoderPlace
    max_pixels: int
    items: tuple[PlanItem, ...]

    def used(self, where: str) -> float:
        """Bytes on one kind of GPU."""
        return sum(item.bytes for item in self.items if item.where == where)

    @property
    def headroom(self) -> float:
        """Bytes left on the fuller GPU; negative if the plan does not fit."""
        places = {item.where for item in self.items}
        return self.gpu.memory - max(self.used(where) for where in places)

    def lines(self) -> list[str]:
        """The plan as a table."""
        side = round(self.max_pixels**0.5)
        separate = self.text_encoder == "separate"
        out = [
            f"{self.model} on {self.gpu.name}, precision {self.precision}, pictures up to "
            f"{self.max_pixels / 1e6:.2f} megapixels ({side}x{side})",
            "",
            f"{'part':<28}{'parameters':>12}{'GB':>9}   where",
        ]
        for item in self.items:
            count = "" if item.parameters is None else _count(item.parameters)
            out.append(f"{item.name:<28}{count:>12}{item.bytes / GB:>9.1f}   {item.where}")
        out.append("")
        for where in dict.fromkeys(item.where for item in self.items):
            used = self.used(where)
            out.append(
                f"{where}: {used / GB:.1f} of {self.gpu.memory / GB:.1f} GB used, "
                f"{(self.gpu.memory - used) / GB:.1f} GB free"
            )
        out.append(
            "The text encoder is a deployment of its own, on a second GPU."
            if separate
            else "All parts share one GPU."
        )
        out.append("Activations and runtime are estimates; weights are counted.")
        return out


def find_gpu(name: str) -> Gpu:
    """A GPU of `GPUS`. Raises InvalidRequest: there is none of this name."""
    card = GPUS.get(name.lower())
    if card is None:
        raise InvalidRequest(f"gpu must be one of {', '.join(GPUS)}; got {name!r}.", param="gpu")
    return card


def plan_memory(
    model: str | pathlib.Path,
    gpu: str,
    precision: str | None = None,
    max_pixels: int = 1024 * 1024,
    text_encoder: TextEncoderPlace | None = None,
) -> MemoryPlan:
    """The memory plan of a model on a GPU.

    Args:
        model: "flux-2-dev", "flux-2-klein-9b", "flux-2-klein-4b", or a diffusers-format folder.
        gpu: a name of `GPUS`.
        precision: float32, bfloat16 or int8; None takes the best that fits, bfloat16 first.
        max_pixels: width x height of the largest image.
        text_encoder: on the denoiser's GPU ("same") or on a second one ("separate"); None takes
            "same" where it fits.

    Raises:
        InvalidRequest: a name is unknown, the GPU cannot compute in this precision, or the plan
            does not fit; then the sentence says what would.
    """
    card = find_gpu(gpu)
    if max_pixels < 256:
        raise InvalidRequest(f"max_pixels must be at least 256; got {max_pixels}.")
    if text_encoder not in (None, "same", "separate"):
        raise InvalidRequest(
            f"text_encoder must be 'same' or 'separate'; got {text_encoder!r}.",
            param="text_encoder",
        )
    _check_precision(precision, card)
    sizes = measure_model(model)
    plans = list(_plans(sizes, card, precision, max_pixels, text_encoder))
    for plan in plans:
        if plan.headroom >= 0:
            return plan
    raise InvalidRequest(_refusal(sizes, plans[-1], precision, text_encoder), param="gpu")


def _check_precision(precision: str | None, card: Gpu) -> None:
    if precision is None or precision in _PRECISIONS:
        return
    if precision.startswith(("fp8", "fp4", "nvfp4", "mxfp4", "float8")):
        why = (
            "is not among the precisions that calotype runs"
            if card.fp8 and "4" not in precision
            else f"needs tensor cores that the {card.name} does not have"
        )
        raise InvalidRequest(
            f"precision {precision} {why}; use int8, which saves memory and time there.",
            param="precision",
        )
    raise InvalidRequest(
        f"precision must be one of {', '.join(_PRECISIONS)}; got {precision!r}.",
        param="precision",
    )


def _plans(
    sizes: ModelSizes,
    card: Gpu,
    precision: str | None,
    max_pixels: int,
    text_encoder: TextEncoderPlace | None,
) -> Iterator[MemoryPlan]:
    """Candidates, best first: a wider precision is worth a second GPU."""
    precisions: tuple[PlanPrecision, ...] = ("bfloat16", "int8")
    for found in precisions if precision is None else (precision,):
        chosen: PlanPrecision = (
            "float32" if found == "float32" else "int8" if found == "int8" else "bfloat16"
        )
        places: tuple[TextEncoderPlace, ...] = ("same", "separate")
        for place in places if text_encoder is None else (text_encoder,):
            yield _plan(sizes, card, chosen, max_pixels, place)


def _plan(
    sizes: ModelSizes,
    card: Gpu,
    precision: PlanPrecision,
    max_pixels: int,
    place: TextEncoderPlace,
) -> MemoryPlan:
    here = "denoiser GPU"
    there = here if place == "same" else "text encoder GPU"
    # Denoising and decoding follow each other: only the larger of the two is alive.
    activations = max(
        sizes.denoiser_activations(max_pixels, precision),
        sizes.vae_activations(max_pixels, precision),
    )
    items = [
        _weights("denoiser", here, sizes.denoiser, precision),
        _weights("VAE", here, sizes.vae, precision),
        PlanItem("activations, 1 picture", here, activations),
        PlanItem("runtime", here, RUNTIME_BYTES),
        _weights("text encoder", there, sizes.text_encoder, precision),
    ]
    if place == "separate":
        items.append(PlanItem("runtime", there, RUNTIME_BYTES))
    return MemoryPlan(sizes.name, card, precision, place, max_pixels, tuple(items))


def _weights(name: str, where: str, part: PartSize, precision: PlanPrecision) -> PlanItem:
    return PlanItem(name, where, weight_bytes(part, precision), part.parameters)


def _refusal(
    sizes: ModelSizes, plan: MemoryPlan, precision: str | None, place: TextEncoderPlace | None
) -> str:
    lead = (
        f"{sizes.name} in {plan.precision}"
        f"{' with its text encoder on the same GPU' if plan.text_encoder == 'same' else ''}"
        f" needs {(plan.gpu.memory - plan.headroom) / GB:.1f} GB for pictures of "
        f"{plan.max_pixels / 1e6:.2f} megapixels, but the {plan.gpu.name} has "
        f"{plan.gpu.memory / GB:.1f} GB"
    )
    # What would fit, the smallest change first: on this GPU, then on the smallest larger one.
    cards = [plan.gpu, *sorted(GPUS.values(), key=lambda gpu: gpu.memory)]
    for card in cards:
        for other in (precision, None) if precision is not None else (None,):
            for there in (place, None) if place is not None else (None,):
                for found in _plans(sizes, card, other, plan.max_pixels, there):
                    if found.headroom >= 0:
                        return f"{lead}; it fits {_advice(plan, found)}."
    return f"{lead}; no known GPU holds it, ask for smaller pictures."


def _advice(plan: MemoryPlan, found: MemoryPlan) -> str:
    parts = []
    if found.gpu.name != plan.gpu.name:
        parts.append(f"on the {found.gpu.name}")
    if found.precision != plan.precision:
        parts.append(f"with precision {found.precision}")
    if found.text_encoder == "separate":
        parts.append("with the text encoder as its own deployment on a second GPU")
    return " and ".join(parts)


def _count(parameters: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)
