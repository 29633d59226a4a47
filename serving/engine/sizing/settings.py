"""What a model's folder says of the model as a whole: `model_index.json` and `calotype.json`."""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass
from typing import Literal

from calotype.serving.core.errors import ModelLoadFailed
from calotype.serving.core.json_object import JsonObject

ChatStyle = Literal["mistral", "qwen"]

PIPELINES = ("Flux2Pipeline", "Flux2KleinPipeline")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What `model_index.json` and `calotype.json` say of a model.

    Attributes:
        max_sequence_length: text tokens of every prompt, padding included.
        text_encoder_out_layers: hidden states of the text encoder that the denoiser reads.
        needs_two_passes: the model is not distilled ([klein] base): it follows a prompt only with
            a second pass for the empty one.
    """

    pipeline: str
    max_sequence_length: int
    text_encoder_out_layers: tuple[int, ...]
    needs_two_passes: bool = False

    @property
    def chat_style(self) -> ChatStyle:
        return "mistral" if self.pipeline == "Flux2Pipeline" else "qwen"


def read_settings(folder: pathlib.Path) -> ModelSettings:
    """Reads `model_index.json` and, where there is one, `calotype.json`.

    Raises:
        ModelLoadFailed: the folder holds no FLUX.2 model.
    """
    if not folder.is_dir():
        raise ModelLoadFailed(f"{folder} is no folder.", param=str(folder))
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ModelLoadFailed(
            f"{folder / 'model_index.json'} names the pipeline {name!r}; calotype draws with "
            "Flux2Pipeline and Flux2KleinPipeline."
        )
    klein = name == "Flux2KleinPipeline"
    own = folder / "calotype.json"
    extra = read_json(own) if own.exists() else {}
    length = extra.get("max_sequence_length", 512)
    layers = extra.get("text_encoder_out_layers", (9, 18, 27) if klein else (10, 20, 30))
    if not isinstance(length, int) or not 1 <= length <= 4096:
        raise ModelLoadFailed(f"{own}: max_sequence_length must be 1 to 4096, got {length!r}.")
    if (
        not isinstance(layers, list | tuple)
        or not layers
        or any(not isinstance(k, int) or k < 0 for k in layers)
    ):
        raise ModelLoadFailed(
            f"{own}: text_encoder_out_layers must be a list of layer numbers, got {layers!r}."
        )
    two = klein and not index.get("is_distilled", False)
    return ModelSettings(str(name), length, tuple(layers), two)


def read_json(path: pathlib.Path) -> JsonObject:
    """A JSON object. Raises ModelLoadFailed: there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadFailed(f"{path} is missing.", param=str(path)) from None
    except (OSError, ValueError) as fault:
        raise ModelLoadFailed(f"{path} is not valid JSON: {fault}.", param=str(path)) from None
    if not isinstance(content, dict):
        raise ModelLoadFailed(f"{path} must hold a JSON object.", param=str(path))
    return content
