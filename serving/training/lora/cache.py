"""The cache stage: pictures become latents and captions become embeddings, once, on disk.

Text encoder and autoencoder's encoder run here and never again, so that a 32 B denoiser has the
device to itself. A caption is encoded as it is, and once more with the class word in place of the
trigger where the run preserves the class.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from calotype.serving.core.errors import StorageFailed
from calotype.serving.engine.model.components import Components
from calotype.serving.engine.model.conditioning import Conditioner
from calotype.serving.engine.model.decoder import pixels_per_token
from calotype.serving.engine.model.input_images import InputImages
from calotype.serving.training.lora.objective import Batch


class Picture(Protocol):
    """What is learnt: a sample of `training.dataset`."""

    @property
    def image(self) -> NDArray[np.uint8]:
        """[3, height, width]"""
        ...

    @property
    def caption(self) -> str: ...


@dataclass(frozen=True, slots=True)
class _Group:
    """Pictures of one size: latents [n, rows * columns, channels]; ``items`` say which pictures."""

    rows: int
    columns: int
    latents: torch.Tensor
    items: torch.Tensor


class CachedSet:
    """Latents by resolution and embeddings by picture, in memory, on the device.

    A set of twenty pictures is a few hundred MB for FLUX.2 [dev], of which most are embeddings
    (15.7 MB each); they are mapped from the file and read as they are needed.
    """

    def __init__(self, path: pathlib.Path, device: torch.device) -> None:
        self._device = device
        groups: dict[int, list[_Group]] = {}
        with safe_open(str(path), framework="pt") as file:
            for name in sorted(file.keys()):
                kind, _, rest = name.partition(".")
                if kind == "latents":
                    resolution, rows, columns = (int(n) for n in rest.split("x"))
                    latents = file.get_tensor(name)
                    items = file.get_tensor(f"items.{rest}")
                    groups.setdefault(resolution, []).append(_Group(rows, columns, latents, items))
            self._text = file.get_tensor("text")
            self._classes = file.get_tensor("classes") if "classes" in file.keys() else None
            self._empty = file.get_tensor("empty")
            self._prompts = file.get_tensor("prompts") if "prompts" in file.keys() else None
        self._groups = groups
        self.pictures = len(self._text)

    @property
    def sample_prompts(self) -> torch.Tensor | None:
        """Embeddings of the prompts that samples are drawn of, [n, text tokens, width]."""
        return self._prompts

    def batch(self, step: int, resolution: int, size: int, dropout: float, seed: int) -> Batch:
        """The pictures of step ``step``: a function of its arguments alone.

        Every picture comes once before one comes again; pictures of a step have one size. The last
        batch of a round is filled up from that size's beginning.
        """
        groups = self._groups[resolution]
        per_round = [-(-len(group.items) // size) for group in groups]
        turn, place = divmod(step, sum(per_round))
        generator = torch.Generator().manual_seed(_seed(seed, "round", turn))
        orders = [torch.randperm(len(group.items), generator=generator) for group in groups]
        batches = [(g, k) for g, count in enumerate(per_round) for k in range(count)]
        which, part = batches[int(torch.randperm(len(batches), generator=generator)[place])]
        group, order = groups[which], orders[which]
        rows = order[(torch.arange(size) + part * size) % len(order)]
        items = group.items[rows]
        chance = torch.Generator().manual_seed(_seed(seed, "dropout", step))
        dropped = torch.rand(size, generator=chance) < dropout
        text = self._text[items]
        if bool(dropped.any()):
            text = torch.where(dropped[:, None, None], self._empty, text)
        classes = None
        if self._classes is not None:
            words = torch.randint(len(self._classes), (size,), generator=chance)
            classes = self._classes[words, items].to(self._device)
        return Batch(
            group.rows,
            group.columns,
            group.latents[rows].to(self._device),
            text.to(self._device),
            classes,
        )


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The CPU generator from which one step of one process draws times and noise."""
    return torch.Generator().manual_seed(_seed(seed, f"noise/{rank}", step))


def _seed(seed: int, what: str, number: int) -> int:
    digest = hashlib.sha256(f"{seed}/{what}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def cache_key(*parts: object) -> str:
    """A short digest of what a cache was made of; another one is another file."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:24]


@torch.inference_mode()
def write_cache(
    path: pathlib.Path,
    components: Components,
    sets: Mapping[int, Iterable[Picture]],
    class_captions: Sequence[Callable[[str], str]],
    prompts: Sequence[str],
    on_picture: Callable[[], None],
) -> None:
    """Encodes the pictures at each resolution and every caption, and writes the cache whole.

    Args:
        sets: resolution -> the same pictures in the same order.
        class_captions: each makes of a caption one with a class word in place of the trigger.
        prompts: that samples will be drawn of.

    Raises:
        StorageFailed: the disk is full; nothing is left behind.
    """
    encoder = components.text_encoder
    if encoder is None:
        raise ValueError("the text encoder was not loaded")
    side = pixels_per_token(components.vae)
    conditioner = Conditioner(components.vae, components.dtype, side)
    tensors: dict[str, torch.Tensor] = {}
    captions: list[str] = []
    for number, (resolution, pictures) in enumerate(sets.items()):
        groups: dict[tuple[int, int], list[tuple[int, torch.Tensor]]] = {}
        for item, picture in enumerate(pictures):
            pixels = np.ascontiguousarray(picture.image.transpose(1, 2, 0))
            start = conditioner.encode(InputImages(start=pixels)).start
            assert start is not None
            place = (pixels.shape[0] // side, pixels.shape[1] // side)
            groups.setdefault(place, []).append((item, start.cpu()))
            if not number:
                captions.append(picture.caption)
            on_picture()
        for (rows, columns), found in groups.items():
            name = f"{resolution}x{rows}x{columns}"
            tensors[f"latents.{name}"] = torch.stack([latents for _, latents in found])
            tensors[f"items.{name}"] = torch.tensor([item for item, _ in found])

    def encoded(texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([made.embeds.cpu() for made in encoder.encode(texts)])

    tensors["text"] = encoded(captions)
    tensors["empty"] = encoded([""])[0]
    if class_captions:
        tensors["classes"] = torch.stack(
            [encoded([reword(caption) for caption in captions]) for reword in class_captions]
        )
    if prompts:
        tensors["prompts"] = encoded(prompts)
    write_tensors(path, tensors, {})


def write_tensors(
    path: pathlib.Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Writes a safetensors file whole or not at all, on the disk when it returns.

    Raises:
        StorageFailed: it cannot be written; what was there before is still there.
    """
    unfinished = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in tensors.items()}, str(unfinished), metadata)
        # safetensors makes files that their owner alone reads; a replica may be another user.
        unfinished.chmod(0o644)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except Exception as fault:
        # safetensors raises its own error for a full disk.
        unfinished.unlink(missing_ok=True)
        raise StorageFailed(
            f"{path} cannot be written: {fault}. Free some space; what was there before is kept.",
            param=str(path),
        ) from fault
