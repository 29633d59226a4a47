"""A request in the middle of its steps, as bytes: taken on one machine, gone on with on another.

What is kept is what cannot be computed again: latents, what samplers remember, where the noise is,
images that are finished. It fits only the same request, model and adapters; then the image is
the same to the bit as if it had never stopped, on the same kind of device, in any company.
"""

from __future__ import annotations

import hashlib
import json

import torch

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.request import GenerationRequest
from calotype.serving.engine.execution.batch import DenoiseState, Row
from calotype.serving.engine.model.components import Components

_VERSION = "1"

_NOT_DRAWN = (
    "id",
    "size",
    "preview_every",
    "priority",
    "tenant",
    "weight",
    "deadline_seconds",
    "checkpoint_every",
)
"""Fields of a request that do not change its images."""


def save(state: DenoiseState, components: Components) -> bytes:
    """The checkpoint of a request between two steps."""
    from safetensors.torch import save as to_bytes

    tensors: dict[str, torch.Tensor] = {}
    for i, row in enumerate(state.rows):
        tensors[f"{i}.noise"] = row.noise.state()
        for slot, tensor in enumerate(row.sampler.remembered()):
            tensors[f"{i}.remembered.{slot}"] = tensor
        for name in ("latents", "start_noise"):
            tensor_or_none: torch.Tensor | None = getattr(row, name)
            if tensor_or_none is not None:
                tensors[f"{i}.{name}"] = tensor_or_none
        if i in state.images:
            tensors[f"{i}.image"] = torch.tensor(state.images[i])
    head = {
        "version": _VERSION,
        "request": _digest(state.request),
        "model": _model(components),
        "done": [row.sampler.done for row in state.rows],
        "steps": state.steps_done,
        "seconds": state.seconds,
        "adapters": {a.name: a.digest for a in state.pinned},
    }
    # Copies: rows of a batch share memory, which the format does not allow.
    whole = {
        name: tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return bytes(to_bytes(whole, {"checkpoint": json.dumps(head)}))


def restore(state: DenoiseState, data: bytes, components: Components) -> None:
    """Brings a request that has not started to where its checkpoint was taken.

    Raises:
        InvalidRequest: it is damaged, or of another request or model.
    """
    from safetensors.torch import load as from_bytes

    try:
        tensors: dict[str, torch.Tensor] = from_bytes(data)
        length = int.from_bytes(data[:8], "little")
        head = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["checkpoint"])
        version, rows = head["version"], [int(n) for n in head["done"]]
        same = (head["request"], head["model"]) == (_digest(state.request), _model(components))
    except Exception as fault:  # safetensors raises an exception class of its own
        raise _refused(f"is damaged ({type(fault).__name__})") from fault
    if version != _VERSION:
        raise _refused(f"is of version {version!r}, not {_VERSION!r}")
    if not same or len(rows) != len(state.rows):
        raise _refused("was taken of another request or with another model")
    try:
        for i, row in enumerate(state.rows):
            _restore_row(row, i, rows[i], tensors, components)
            if f"{i}.image" in tensors:
                state.images[i] = tensors[f"{i}.image"].numpy()
    except (KeyError, RuntimeError, TypeError) as fault:
        raise _refused(f"is damaged ({fault})") from fault
    state.seconds = float(head["seconds"])
    state.reported = state.saved = int(head["steps"])
    state.revisions = {str(name): str(digest) for name, digest in head["adapters"].items()}


def check_adapters(state: DenoiseState) -> None:
    """Whether the adapters are those that the checkpoint was taken with.

    Raises:
        InvalidRequest: one of them changed; half an image of each would be neither.
    """
    for adapter in state.pinned if state.revisions is not None else ():
        if (state.revisions or {}).get(adapter.name) != adapter.digest:
            raise _refused(f"was taken with another revision of the adapter {adapter.name!r}")


def _restore_row(
    row: Row, place: int, done: int, tensors: dict[str, torch.Tensor], components: Components
) -> None:
    if not 0 <= done <= row.sampler.evaluations:
        raise KeyError(f"{done} evaluations")
    if done == row.sampler.evaluations and f"{place}.image" not in tensors:
        raise KeyError(f"{place}.image")
    row.noise.restore(tensors[f"{place}.noise"])
    kept: list[torch.Tensor] = []
    while f"{place}.remembered.{len(kept)}" in tensors:
        kept.append(tensors[f"{place}.remembered.{len(kept)}"].to(components.device))
    row.sampler.restore(done, kept)
    for name in ("latents", "start_noise"):
        found = tensors.get(f"{place}.{name}")
        setattr(row, name, None if found is None else found.to(components.device))
    if done and row.latents is None:
        raise KeyError(f"{place}.latents")


def _digest(request: GenerationRequest) -> str:
    """Of everything that changes a request's images."""
    drawn = request.to_payload()
    for name in _NOT_DRAWN:
        drawn.pop(name)
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def _model(components: Components) -> str:
    return f"{components.fingerprint} {components.precision}"


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"checkpoint {why}; leave it out to draw from the start.", param="checkpoint"
    )
