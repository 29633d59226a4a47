"""Checkpoints of a run, from which it goes on exactly as if it had never stopped.

A checkpoint is one safetensors file: factors, their average and the optimiser's state, and in its
metadata the step, the digests of recipe, data and base, and a sha256 of the tensors. Times, noise
and the order of pictures are functions of seed and step, so that the step is also the state of the
random numbers and of the sampler.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from calotype.serving.core.errors import Conflict, TrainingFailed
from calotype.serving.core.json_object import JsonObject
from calotype.serving.engine.model.weight_files import read_tensors
from calotype.serving.engine.sizing.weight_header import read_header
from calotype.serving.training.lora.cache import write_tensors

_NAME = re.compile(r"step-([0-9]{7})\.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything of a run that changes.

    Attributes:
        tensors: by name; `tensors_digest` is over all of them.
        losses: of the last steps, oldest first.
        seconds: spent in steps so far.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    losses: tuple[float, ...]
    seconds: float


class Checkpoints:
    """The checkpoints of one run in a folder.

    Args:
        run: digests by name of what must be equal for a run to go on: recipe, dataset, base.
        keep: newest files that are kept.
    """

    def __init__(self, folder: pathlib.Path, run: Mapping[str, str], keep: int) -> None:
        self._folder, self._run, self._keep = folder, dict(run), keep

    def save(self, found: Checkpoint) -> pathlib.Path:
        """Writes one whole, then drops the oldest.

        Raises:
            StorageFailed: the disk is full; the ones before are kept.
        """
        path = self._folder / f"step-{found.step:07d}.safetensors"
        state = {
            "step": found.step,
            "losses": list(found.losses),
            "seconds": found.seconds,
            "run": self._run,
            "digest": tensors_digest(found.tensors),
        }
        write_tensors(path, found.tensors, {"calotype": json.dumps(state)})
        for old in self._files()[: -self._keep]:
            old.unlink(missing_ok=True)
        return path

    def latest(self, on_damaged: Callable[[pathlib.Path, str], None]) -> Checkpoint | None:
        """The newest one that can be read; damaged ones are told and passed over.

        Raises:
            Conflict: it is of another recipe, data set or base; says which.
            TrainingFailed: there are some, and all are damaged (``checkpoint_corrupt``).
        """
        files = self._files()
        for path in reversed(files):
            try:
                return self._read(path)
            except TrainingFailed as fault:
                on_damaged(path, str(fault))
        if files:
            raise TrainingFailed(
                f"None of the {len(files)} checkpoints in {self._folder} can be read; remove the "
                "folder to begin anew.",
                code="checkpoint_corrupt",
                param=str(self._folder),
            )
        return None

    def _read(self, path: pathlib.Path) -> Checkpoint:
        header = read_header(path, TrainingFailed)
        try:
            state: JsonObject = json.loads(header.metadata["calotype"])
            run = dict(state["run"])
            step, seconds = int(state["step"]), float(state["seconds"])
            losses, digest = tuple(float(n) for n in state["losses"]), str(state["digest"])
        except (KeyError, ValueError, TypeError) as fault:
            raise _damaged(path, f"its metadata lacks {fault}") from fault
        for name, wanted in self._run.items():
            if run.get(name) != wanted:
                raise Conflict(
                    f"{path} was made with another {name}. Give what it was begun with, or another "
                    "--work folder for a new run.",
                    code="checkpoint_mismatch",
                    param=name,
                )
        tensors = {
            name: tensor.clone()
            for name, tensor in read_tensors(header, set(header.tensors), torch.device("cpu"))
        }
        if tensors_digest(tensors) != digest:
            raise _damaged(path, "its contents are not those that were written")
        return Checkpoint(step, tensors, losses, seconds)

    def _files(self) -> list[pathlib.Path]:
        if not self._folder.is_dir():
            return []
        return sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: pathlib.Path, why: str) -> TrainingFailed:
    return TrainingFailed(
        f"The checkpoint {path} is damaged: {why}.", code="checkpoint_corrupt", param=str(path)
    )
