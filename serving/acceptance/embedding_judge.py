"""The judge for every other model: embeddings of crops, against those of the training pictures.

A similarity means nothing by itself: two unrelated photographs may have 0.6 with one embedding and
0.1 with another. So it is read between two fixed points that the same embedding gives: what the
model's own pictures without the adapter reach (0), and what a training picture reaches against the
others (1).
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from calotype.serving.acceptance.judges import Judge
from calotype.serving.core.errors import InvalidRequest

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels

Vectors = NDArray[np.float32]
_CROPS = ((0.0, 0.0, 1.0), (0.15, 0.15, 0.7), (0.0, 0.0, 0.6), (0.4, 0.0, 0.6), (0.0, 0.4, 0.6),
          (0.4, 0.4, 0.6))  # fmt: skip
"""Left, top and side of each, as shares of the picture's sides: a subject may stand anywhere."""
_NEIGHBOURS = 3
"""Training pictures that a picture must be like: a subject is seen from several sides."""


class Embedding(Protocol):
    """Pictures and texts as unit vectors of one space."""

    def pictures(self, pictures: Sequence[Pixels]) -> Vectors:
        """float32 [n, d]."""
        ...

    def texts(self, texts: Sequence[str]) -> Vectors:
        """float32 [n, d]."""
        ...


class VisionTower:
    """CLIP or SigLIP of a folder, by transformers' own classes.

    Raises:
        InvalidRequest: the folder holds no model of pictures and texts.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        import torch
        from transformers import AutoModel, AutoProcessor

        self._torch = torch
        try:
            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self._model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        except (OSError, ValueError) as error:
            raise InvalidRequest(
                f"{folder} holds no model that embeds pictures and texts ({error}); give the "
                "folder of a CLIP or SigLIP model, with its processor.",
                param="embedder",
            ) from None
        if not hasattr(self._model, "get_text_features"):
            raise InvalidRequest(
                f"{folder} is a {type(self._model).__name__}, which embeds no texts; give the "
                "folder of a CLIP or SigLIP model.",
                param="embedder",
            )

    def pictures(self, pictures: Sequence[Pixels]) -> Vectors:
        given = self._processor(images=list(pictures), return_tensors="pt")
        with self._torch.inference_mode():
            return _unit(self._model.get_image_features(**given))

    def texts(self, texts: Sequence[str]) -> Vectors:
        given = self._processor(
            text=list(texts), padding="max_length", truncation=True, return_tensors="pt"
        )
        with self._torch.inference_mode():
            return _unit(self._model.get_text_features(**given))


def _unit(found: object) -> Vectors:
    # transformers 5 answers with the tower's whole output.
    tensor = getattr(found, "pooler_output", found)
    vectors: Vectors = np.asarray(tensor, dtype=np.float32)
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


class EmbeddingJudge(Judge):
    """Similarity of crops, between what the bare model and what the training pictures reach.

    Args:
        training: pictures of the subject; without any, `subject` cannot be asked.
        without: pictures that the model drew without the adapter.
        words: the texts that stand for the subject, which `adherence` leaves out.
    """

    name = "embedding"

    def __init__(
        self,
        embedding: Embedding,
        training: Sequence[Pixels],
        without: Sequence[Pixels],
        words: Sequence[str] = (),
    ) -> None:
        self._embedding = embedding
        self._words = tuple(words)
        if training:
            self._known = embedding.pictures(training)
            self._low = float(np.median(self._raw(without)))
            crops = self._crops(training)
            alike = [
                _nearest(crops[i], np.delete(self._known, i, axis=0)) for i in range(len(training))
            ]
            self._high = float(np.median(alike))

    def subject(self, pictures: Sequence[Pixels]) -> list[float]:
        span = max(1e-3, self._high - self._low)
        return [min(1.0, max(0.0, (raw - self._low) / span)) for raw in self._raw(pictures)]

    def adherence(self, prompts: Sequence[str], pictures: Sequence[Pixels]) -> list[float]:
        """The share of the other prompts that a picture fits less than its own."""
        if len(prompts) < 2:
            return [1.0] * len(prompts)
        plain = [self._without_words(prompt) for prompt in prompts]
        fits = self._embedding.pictures(pictures) @ self._embedding.texts(plain).T
        own = np.diagonal(fits)[:, None]
        others = ~np.equal.outer(plain, plain)
        better = ((own > fits) & others).sum(axis=1) / np.maximum(1, others.sum(axis=1))
        return [float(share) for share in better]

    def _without_words(self, prompt: str) -> str:
        for word in self._words:
            prompt = prompt.replace(word, "thing")
        return prompt

    def _raw(self, pictures: Sequence[Pixels]) -> list[float]:
        return [_nearest(crops, self._known) for crops in self._crops(pictures)]

    def _crops(self, pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        """[n, crops, d]."""
        cut = [_cut(picture, crop) for picture in pictures for crop in _CROPS]
        return self._embedding.pictures(cut).reshape(len(pictures), len(_CROPS), -1)


def _cut(picture: Pixels, crop: tuple[float, float, float]) -> Pixels:
    height, width = picture.shape[:2]
    left, top, side = crop
    rows = slice(int(top * height), int((top + side) * height))
    return picture[rows, int(left * width) : int((left + side) * width)]


def _nearest(crops: Vectors, known: Vectors) -> float:
    """Mean similarity to the most similar training pictures, each by the best crop."""
    best = np.sort((crops @ known.T).max(axis=0))[::-1]
    return float(best[:_NEIGHBOURS].mean())
