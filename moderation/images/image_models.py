"""Larger image classifiers, as folders of weights that the operator of the service provides.

Each is an `ImageClassifier`: it takes uint8 images [height, width, 3] and answers scores from 0
to 1. Weights are read from safetensors in a folder, never fetched. torch is imported with the first
of them.

* ``falconsai``: Falconsai/nsfw_image_detection, a ViT: sexual or not.
* ``sd-safety-checker``: CLIP and 17 concepts, Stable Diffusion's; its own forward pass blackens the
  image and throws the scores away, so they are computed here.
* ``shieldgemma-2``: google/shieldgemma-2-4b-it, asked one policy after the other.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from calotype.moderation.classifiers import ImageClassifier, Pixels, Scores
from calotype.moderation.errors import ClassifierUnavailable
from calotype.moderation.policy.categories import Category

SHIELDGEMMA_POLICIES = {
    "sexual": Category.SEXUAL,
    "violence": Category.VIOLENCE_GRAPHIC,
    "dangerous": Category.ILLICIT,
}
_CONCEPT_SLOPE = 100.0
"""The checker's margin is about a hundredth: 0.01 above its limit is 0.73 here, 0.03 is 0.95."""


class Falconsai:
    """Raises ClassifierUnavailable: the folder holds no such model."""

    name = "falconsai"

    def __init__(self, folder: pathlib.Path) -> None:
        _need_folder(self.name, folder)
        from transformers import AutoImageProcessor, ViTForImageClassification

        self._model = _loaded(self.name, ViTForImageClassification, folder)
        self._processor = _loaded(self.name, AutoImageProcessor, folder)
        labels = {str(label).lower(): int(at) for at, label in self._model.config.id2label.items()}
        if "nsfw" not in labels:
            raise ClassifierUnavailable(
                f"Classifier {self.name}: {folder} has no label nsfw but {', '.join(labels)}."
            )
        self._unsafe = labels["nsfw"]

    def score(self, images: Sequence[Pixels]) -> list[Scores]:
        import torch

        inputs = self._processor(images=_images(images), return_tensors="pt")
        with torch.inference_mode():
            chances = self._model(**inputs).logits.float().softmax(dim=-1)
        return [{Category.SEXUAL: float(row[self._unsafe])} for row in chances]


class SafetyChecker:
    """Raises ClassifierUnavailable: the folder holds no such model."""

    name = "sd-safety-checker"

    def __init__(self, folder: pathlib.Path) -> None:
        _need_folder(self.name, folder)
        from diffusers.pipelines.stable_diffusion.safety_checker import (
            StableDiffusionSafetyChecker,
        )
        from transformers import CLIPImageProcessor

        self._model = _loaded(self.name, StableDiffusionSafetyChecker, folder)
        self._processor = _loaded(self.name, CLIPImageProcessor, folder)

    def score(self, images: Sequence[Pixels]) -> list[Scores]:
        import torch

        # CLIP's own processor cuts a square out of the middle: what stands at the side of a wide
        # image would not be seen.
        squares = [_squared(image) for image in _images(images)]
        inputs = self._processor(images=squares, return_tensors="pt")
        with torch.inference_mode():
            seen = self._model.visual_projection(
                self._model.vision_model(inputs["pixel_values"]).pooler_output
            )
            special = _margins(seen, self._model, "special_care_embeds")
            concepts = _margins(seen, self._model, "concept_embeds")
            stricter = 0.01 * (special > 0).any(dim=1, keepdim=True)
            highest = (concepts + stricter).max(dim=1).values
        return [{Category.SEXUAL: _logistic(_CONCEPT_SLOPE * float(one))} for one in highest]


class ShieldGemma2:
    """Raises ClassifierUnavailable: the folder holds no such model."""

    name = "shieldgemma-2"

    def __init__(self, folder: pathlib.Path) -> None:
        _need_folder(self.name, folder)
        from transformers import AutoProcessor, ShieldGemma2ForImageClassification

        self._model = _loaded(self.name, ShieldGemma2ForImageClassification, folder)
        self._processor = _loaded(self.name, AutoProcessor, folder)

    def score(self, images: Sequence[Pixels]) -> list[Scores]:
        return [self._score(image) for image in _images(images)]

    def _score(self, image: Image.Image) -> Scores:
        import torch

        inputs = self._processor(
            images=[image], policies=list(SHIELDGEMMA_POLICIES), return_tensors="pt"
        )
        with torch.inference_mode():
            logits = self._model(**inputs).logits.float()
        # Column 0 is "Yes, it violates"; the example in transformers' own docstring takes column 1.
        chances = logits.softmax(dim=-1)[:, 0]
        return {
            category: float(chance)
            for category, chance in zip(SHIELDGEMMA_POLICIES.values(), chances, strict=True)
        }


IMAGE_MODELS: dict[str, Callable[[pathlib.Path], ImageClassifier]] = {
    model.name: model for model in (Falconsai, SafetyChecker, ShieldGemma2)
}


def _need_folder(name: str, folder: pathlib.Path) -> None:
    if not (folder / "config.json").is_file():
        raise ClassifierUnavailable(f"Classifier {name} has no model in {folder}.")


def _loaded(name: str, kind: Any, folder: pathlib.Path) -> Any:
    options = {"use_safetensors": True} if hasattr(kind, "forward") else {}
    try:
        part = kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # every library raises its own
        raise ClassifierUnavailable(f"Classifier {name} cannot load {folder}: {error}") from error
    return part.eval() if hasattr(part, "eval") else part


def _images(images: Sequence[Pixels]) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images]


def _squared(image: Image.Image) -> Image.Image:
    """The whole image in the middle of a grey square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (128, 128, 128))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _margins(seen: Any, model: Any, concepts: str) -> Any:
    """[images, concepts]: how far each image is beyond the limit of each concept."""
    import torch

    known, limits = getattr(model, concepts), getattr(model, f"{concepts}_weights")
    near = torch.nn.functional.cosine_similarity(seen[:, None], known[None], dim=-1)
    return near - limits


def _logistic(value: float) -> float:
    return float(1 / (1 + math.exp(-float(np.clip(value, -60, 60))))) if value == value else value
