"""Captions by the model's own text encoder, where it can see.

FLUX.2 [dev] reads prompts with Mistral-Small-3.2, a vision model: whoever has the model folder
needs no other captioner. [klein]'s Qwen3 is blind, and so is the embedded miniature, whose vision
tower is there only for its file names. transformers is imported when a model is loaded.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from PIL import Image

from calotype.serving.core.errors import ModelLoadFailed
from calotype.serving.training.dataset.captions import Captioner
from calotype.serving.training.dataset.images.pictures import Pixels

ASKED = "Describe this picture in one sentence of at most 40 words, for somebody who will draw it."
_MOST_TOKENS = 96
_FEWEST_LAYERS = 8
"""A vision tower with fewer has never learnt to see: Pixtral's has 24."""
_LONGEST_SIDE = 768


def find_captioner(model: pathlib.Path) -> tuple[Captioner | None, str]:
    """The captioner of a model folder, and a sentence that says what there is.

    Raises:
        ModelLoadFailed: there is no text encoder, or it cannot be loaded.
    """
    reason = blind_because(model)
    if reason is not None:
        return None, f"{reason}: pictures without a caption are learnt with the trigger word only."
    return Sighted(model).describe, f"Missing captions are written by the text encoder of {model}."


def blind_because(model: pathlib.Path) -> str | None:
    """Why the text encoder of a model folder cannot describe pictures; None = it can."""
    place = model / "text_encoder" / "config.json"
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadFailed(f"{place} cannot be read: {error}.", param=str(place)) from None
    layers = (config.get("vision_config") or {}).get("num_hidden_layers", 0)
    if layers == 0:
        return f"The text encoder of {model} sees no pictures"
    if layers < _FEWEST_LAYERS:
        return f"The vision tower of {model}'s text encoder has {layers} layers, too few to see"
    return None


class Sighted:
    """A text encoder that writes captions; on the GPU where there is one."""

    def __init__(self, model: pathlib.Path) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                model / "text_encoder", dtype="auto", local_files_only=True
            )
            self._processor: Any = AutoProcessor.from_pretrained(
                model / "tokenizer", local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ModelLoadFailed(
                f"The text encoder of {model} cannot be loaded to write captions: {error}.",
                param=str(model),
            ) from None
        self._model = loaded.to(device).eval()

    def describe(self, pixels: Pixels) -> str:
        """One sentence; the same for the same picture."""
        import torch

        image = Image.fromarray(pixels)
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        asked = [{"type": "image", "image": image}, {"type": "text", "text": ASKED}]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": asked}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._model.device)
        with torch.inference_mode():
            written = self._model.generate(**inputs, max_new_tokens=_MOST_TOKENS, do_sample=False)
        told = written[0, inputs["input_ids"].shape[1] :]
        text: str = self._processor.decode(told, skip_special_tokens=True)
        return " ".join(text.split())
