"""Whether a picture is a training picture drawn again.

Two tests, either of which is enough: PDQ, which knows a copy that was resized or saved again, and
the distance to the nearest training picture in the latents of the model's own autoencoder. The
bound of the distance is measured on the training pictures: what is nearer to one of them than 95 %
of them are to each other is a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calotype.moderation.images.pdq import SAME, USABLE_QUALITY, distances, pdq
from calotype.serving.core.errors import InvalidRequest

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels
    from calotype.serving.engine.model.components import Components

Encode = Callable[[Sequence["Pixels"]], NDArray[np.float32]]
"""Pictures of one size to latents [n, values]."""

PERCENTILE = 5.0
"""Of the distances: the 95th percentile of the similarities."""
LEAST_SHARE = 0.25
"""Of the median distance between neighbours: near-duplicates among the training pictures must not
bring the bound down to where a blurred copy passes."""


class CopyDetector:
    """Knows the training pictures.

    Args:
        training: at least two.
        size: width and height of the pictures that are judged.

    Raises:
        InvalidRequest: fewer than two training pictures.
    """

    def __init__(self, training: Sequence[Pixels], size: tuple[int, int], encode: Encode) -> None:
        if len(training) < 2:
            raise InvalidRequest(
                f"Copies are told from new pictures by how much training pictures differ; there "
                f"are {len(training)}, and 2 are needed at least.",
                code="dataset_too_small",
                param="dataset",
            )
        self._encode, self._size = encode, size
        fitted = [_fitted(picture, size) for picture in training]
        self._latents = encode(fitted)
        hashes = [pdq(picture) for picture in fitted]
        usable = [h.words for h in hashes if h.quality >= USABLE_QUALITY]
        self._hashes = np.stack(usable) if usable else np.empty((0, 4), dtype=np.uint64)
        between = _distances(self._latents, self._latents)
        np.fill_diagonal(between, np.inf)
        nearest = between.min(axis=1)
        self.bound = float(
            max(np.percentile(nearest, PERCENTILE), LEAST_SHARE * np.median(nearest))
        )

    def copies(self, pictures: Sequence[Pixels]) -> list[int | None]:
        """For each picture the number of the training picture that it is a copy of, or None."""
        if not pictures:
            return []
        away = _distances(self._encode([_fitted(p, self._size) for p in pictures]), self._latents)
        found: list[int | None] = []
        for picture, row in zip(pictures, away, strict=True):
            near = int(row.argmin())
            found.append(near if row[near] < self.bound or self._hashed(picture) else None)
        return found

    def _hashed(self, picture: Pixels) -> bool:
        seen = pdq(picture)
        if seen.quality < USABLE_QUALITY or not len(self._hashes):
            return False
        return bool((distances(self._hashes, seen.words) <= SAME).any())


def autoencoder_latents(components: Components) -> Encode:
    """The latents of a loaded model's autoencoder, normalised as its denoiser sees them."""
    import torch

    from calotype.serving.engine.model.latents import normalize, patchify

    vae = components.vae
    assert vae is not None, "it was asked for"

    def encode(pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        weight = next(vae.parameters())
        found = []
        with torch.inference_mode():
            for picture in pictures:  # one by one: a batch of large pictures needs much memory
                pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
                given = pixels.to(weight.device, weight.dtype) / 127.5 - 1
                latents = normalize(
                    patchify(vae.encode(given)),
                    vae.bn.running_mean,
                    vae.bn.running_var,
                    vae.config.batch_norm_eps,
                )
                found.append(latents.float().flatten().cpu().numpy())
        return np.stack(found)

    return encode


def _distances(some: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Root mean square of the differences: [n, m]."""
    a, b = some.astype(np.float64), others.astype(np.float64)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :] - 2 * a @ b.T
    root: NDArray[np.float64] = np.sqrt(np.maximum(0, squares) / a.shape[1])
    return root


def _fitted(picture: Pixels, size: tuple[int, int]) -> Pixels:
    """Cut to the aspect of ``size`` around its middle, and resized to it."""
    width, height = size
    if picture.shape[:2] == (height, width):
        return picture
    image = Image.fromarray(picture)
    scale = max(width / image.width, height / image.height)
    side = round(width / scale), round(height / scale)
    left, top = (image.width - side[0]) // 2, (image.height - side[1]) // 2
    box = (left, top, left + side[0], top + side[1])
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box))
