"""A FLUX.2 folder in diffusers format, in memory: text encoder, denoiser, VAE, noise schedule.

Every file is checked before torch reads it, only the parts asked for are loaded, and only what
they need is imported. Weights are read straight into modules built on the meta device, so no
memory is spent on random numbers. Called by the engine's owner; knows nothing of requests.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from calotype.serving.core.errors import ModelLoadFailed
from calotype.serving.core.json_object import JsonObject
from calotype.serving.engine.model.autoencoder import Autoencoder
from calotype.serving.engine.model.noise_schedule import ScheduleConfig
from calotype.serving.engine.model.quantization import quantize_int8
from calotype.serving.engine.model.text_encoder import TextEncoder
from calotype.serving.engine.model.text_model import TextModel
from calotype.serving.engine.model.tokenizer import load_tokenizer
from calotype.serving.engine.model.transformer import Transformer
from calotype.serving.engine.model.weight_files import read_tensors, unfilled
from calotype.serving.engine.sizing.configs import (
    AutoencoderConfig,
    TextModelConfig,
    TransformerConfig,
)
from calotype.serving.engine.sizing.settings import ModelSettings, read_json, read_settings
from calotype.serving.engine.sizing.weight_header import (
    WeightHeader,
    find_weight_headers,
    fingerprint,
)

Part = Literal["text_encoder", "denoiser", "vae"]
Precision = Literal["float32", "bfloat16", "int8"]


@dataclass(slots=True)
class Components:
    """A loaded model; parts that were not asked for are None.

    Attributes:
        dtype: of activations and latents (bfloat16 where weights are int8).
        fingerprint: tells the denoiser's weights from others; empty if it was not loaded.
    """

    folder: pathlib.Path
    settings: ModelSettings
    device: torch.device
    dtype: torch.dtype
    schedule: ScheduleConfig
    precision: Precision = "float32"
    fingerprint: str = ""
    text_encoder: TextEncoder | None = None
    loaded_denoiser: Transformer | None = None
    loaded_vae: Autoencoder | None = None

    @property
    def denoiser(self) -> Transformer:
        """The denoiser.

        Raises:
            ValueError: it was not loaded.
        """
        if self.loaded_denoiser is None:
            raise ValueError("the denoiser was not loaded")
        return self.loaded_denoiser

    @property
    def vae(self) -> Autoencoder:
        """The autoencoder.

        Raises:
            ValueError: it was not loaded.
        """
        if self.loaded_vae is None:
            raise ValueError("the autoencoder was not loaded")
        return self.loaded_vae


def load_components(
    folder: pathlib.Path | str,
    *,
    parts: Sequence[Part] = ("text_encoder", "denoiser", "vae"),
    device: str | torch.device = "cpu",
    precision: Precision = "float32",
) -> Components:
    """Loads the named parts of a diffusers-format folder.

    Raises:
        ModelLoadFailed: a file is missing, truncated, pickled or of another model, or the
            precision needs a library that is not installed; one sentence naming the file.
    """
    folder = pathlib.Path(folder)
    if precision not in ("float32", "bfloat16", "int8"):
        raise ModelLoadFailed(
            f"precision must be float32, bfloat16 or int8, got {precision!r}.", param="precision"
        )
    settings = read_settings(folder)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    loaded = Components(
        folder,
        settings,
        torch.device(device),
        dtype,
        _read_schedule(folder / "scheduler" / "scheduler_config.json"),
        precision,
    )
    # All files are looked at before the first is read: a damaged VAE is told in milliseconds, not
    # after the minutes that a denoiser of 64 GB takes.
    found = {part: _find_part(folder, part) for part in parts}
    for part in parts:
        config, headers = found[part]
        if part == "text_encoder":
            model = _load_text_model(loaded, config, headers)
            loaded.text_encoder = TextEncoder(
                quantize_int8(model) if precision == "int8" else model,
                load_tokenizer(folder / "tokenizer"),
                max_sequence_length=settings.max_sequence_length,
                out_layers=settings.text_encoder_out_layers,
                style=settings.chat_style,
            )
        elif part == "denoiser":
            with _described(folder / "transformer"), unfilled():
                denoiser = Transformer(TransformerConfig.from_json(config))
            _fill(denoiser, headers, {}, loaded)
            loaded.loaded_denoiser = quantize_int8(denoiser) if precision == "int8" else denoiser
            loaded.fingerprint = fingerprint(config, headers)
        else:
            with _described(folder / "vae"), unfilled():
                vae = Autoencoder(AutoencoderConfig.from_json(config))
            _fill(vae, headers, {}, loaded)
            # Convolutions run on channels that lie beside each other: a quarter less time.
            loaded.loaded_vae = vae.to(memory_format=torch.channels_last)
    return loaded


def _read_schedule(path: pathlib.Path) -> ScheduleConfig:
    content = read_json(path)
    if content.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise ModelLoadFailed(
            f"{path} names the scheduler {content.get('_class_name')!r}; FLUX.2 has a "
            "FlowMatchEulerDiscreteScheduler."
        )
    try:
        return ScheduleConfig.from_json(content)
    except (TypeError, ValueError) as fault:
        raise ModelLoadFailed(f"{path} describes no schedule of FLUX.2: {fault}.") from fault


def _find_part(folder: pathlib.Path, part: Part) -> tuple[JsonObject, list[WeightHeader]]:
    """Configuration and checked weight files of one part."""
    name = {"text_encoder": "text_encoder", "denoiser": "transformer", "vae": "vae"}.get(part)
    if name is None:
        raise ModelLoadFailed(f"{part!r} is no part; the parts are text_encoder, denoiser, vae.")
    config = read_json(folder / name / "config.json")
    if "quantization_config" in config:
        raise ModelLoadFailed(
            f"{folder / name / 'config.json'} is quantised; give the bfloat16 weights and ask for "
            "precision int8."
        )
    if part == "text_encoder":
        read_json(folder / "tokenizer" / "tokenizer.json")
        return config, find_weight_headers(folder / name, "model", ModelLoadFailed)
    wanted = "Flux2Transformer2DModel" if part == "denoiser" else "AutoencoderKLFlux2"
    if config.get("_class_name") != wanted:
        raise ModelLoadFailed(
            f"{folder / name / 'config.json'} names {config.get('_class_name')!r}; "
            f"FLUX.2 has {wanted}."
        )
    stem = "diffusion_pytorch_model"
    return config, find_weight_headers(folder / name, stem, ModelLoadFailed)


@contextlib.contextmanager
def _described(part: pathlib.Path) -> Iterator[None]:
    """Within, what a configuration makes the modules raise becomes an error that names the file."""
    try:
        yield
    except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as fault:
        raise ModelLoadFailed(f"{part / 'config.json'} describes no model: {fault}.") from fault


def _load_text_model(
    loaded: Components, config: JsonObject, headers: list[WeightHeader]
) -> TextModel:
    """The language model without vision tower, head, and layers above the last one read."""
    where = loaded.folder / "text_encoder" / "config.json"
    kind = config.get("model_type")
    wanted = "mistral3" if loaded.settings.chat_style == "mistral" else "qwen3"
    if kind != wanted:
        raise ModelLoadFailed(
            f"{where} names the model type {kind!r}; {loaded.settings.pipeline} has {wanted!r}."
        )
    last = max(loaded.settings.text_encoder_out_layers)
    with _described(loaded.folder / "text_encoder"):
        sizes = TextModelConfig.from_json(
            config["text_config"] if kind == "mistral3" else config, wanted
        )
        if last <= sizes.layers:
            with unfilled():
                model = TextModel(sizes, last)
    if last > sizes.layers:
        raise ModelLoadFailed(
            f"{where} has {sizes.layers} layers, but layer {last} is to be read; "
            "set text_encoder_out_layers in calotype.json."
        )
    prefixes = {
        prefix: "" for prefix in ("language_model.model.", "model.language_model.", "model.")
    }
    _fill(model, headers, prefixes, loaded, partial=True)
    return model


def _fill(
    module: torch.nn.Module,
    headers: list[WeightHeader],
    prefixes: dict[str, str],
    loaded: Components,
    partial: bool = False,
) -> None:
    """Reads the weights of a module built on the meta device, in place.

    Args:
        prefixes: stored key prefixes to strip; the first that matches counts.
        partial: stored tensors that the module lacks are ignored.

    Raises:
        ModelLoadFailed: a tensor is missing, unknown or of another shape.
    """
    expected = module.state_dict()
    places: dict[str, tuple[WeightHeader, str]] = {}
    for header in headers:
        for stored, info in header.tensors.items():
            key = stored
            for prefix, new in prefixes.items():
                if stored.startswith(prefix):
                    key = new + stored.removeprefix(prefix)
                    break
            if key not in expected:
                if partial:
                    continue
                raise ModelLoadFailed(
                    f"{header.path} holds {stored!r}, which the model does not have.",
                    param=str(header.path),
                )
            if info.shape != tuple(expected[key].shape):
                raise ModelLoadFailed(
                    f"{header.path} holds {stored!r} of shape {list(info.shape)}, but config.json "
                    f"says {list(expected[key].shape)}.",
                    param=str(header.path),
                )
            places[key] = (header, stored)
    missing = sorted(set(expected) - set(places))
    if missing:
        names = ", ".join(repr(name) for name in missing[:3])
        raise ModelLoadFailed(
            f"{headers[0].path.parent} lacks {len(missing)} tensors of the model: {names}.",
            param=str(headers[0].path.parent),
        )
    state: dict[str, torch.Tensor] = {}
    for header in headers:
        wanted = {stored: key for key, (home, stored) in places.items() if home is header}
        for stored, tensor in read_tensors(header, set(wanted), loaded.device):
            dtype = loaded.dtype if tensor.dtype.is_floating_point else tensor.dtype
            # A copy, also where nothing changes: on the CPU the tensor is a view of the file, and
            # a process dies of SIGBUS when a file that it has mapped is written over.
            state[wanted[stored]] = tensor.to(dtype, copy=True)
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)
