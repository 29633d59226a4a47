"""A control adapter's file, checked against the denoiser before one of its tensors is read.

The keys are those of FLUX.2-dev-Fun-Controlnet-Union: ``control_img_in`` and
``control_transformer_blocks.N``. A file loads exactly or not at all.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import torch

from calotype.serving.core.errors import AdapterLoadFailed
from calotype.serving.engine.control.branch import ControlBranch, control_channels, control_layers
from calotype.serving.engine.lora.adapter_fault import AdapterFault
from calotype.serving.engine.model.row_linear import keep_rows_apart
from calotype.serving.engine.model.weight_files import read_tensors, unfilled
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.engine.sizing.weight_header import FLOAT_DTYPES, WeightHeader, read_header

MISMATCH = "control_mismatch"
_NAMED = 3
"""Keys that an error names."""
_INPUT = "control_img_in.weight"
_LORA = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lokr_", ".hada_")
_FLUX_1 = ("controlnet_blocks.", "controlnet_x_embedder.", "input_hint_block.", "pos_embed_input.")
"""Of the nets of InstantX, Shakker and XLabs, which diffusers loads for FLUX.1."""
_IP_ADAPTER = ("ip_adapter", "image_proj", "redux_up", "to_k_ip", "to_v_ip")


def read_branch(
    path: pathlib.Path,
    config: TransformerConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> ControlBranch:
    """A branch with the weights of a file.

    Raises:
        AdapterLoadFailed: the file is damaged, of another model or another kind, or incomplete;
            one sentence naming the file and the fault.
    """
    header = check_branch(path, config)
    with unfilled():
        branch = ControlBranch(config)
    state = {}
    for name, tensor in read_tensors(header, set(header.tensors), torch.device(device)):
        # A copy: a process dies of SIGBUS when a file that it has mapped is written over.
        state[name] = tensor.to(dtype, copy=True)
        if not bool(torch.isfinite(state[name]).all()):
            raise _failed(path, AdapterFault.BAD_WEIGHTS, f"{name} holds NaN or infinity")
    branch.load_state_dict(state, strict=True, assign=True)
    keep_rows_apart(branch)
    branch.eval().requires_grad_(False)
    return branch


def check_branch(path: pathlib.Path, config: TransformerConfig) -> WeightHeader:
    """Looks at the head of a file, at no weight.

    Raises:
        AdapterLoadFailed: see `read_branch`.
    """
    header = read_header(path, AdapterLoadFailed)
    stored = {name: info.shape for name, info in header.tensors.items()}
    _refuse_others(path, stored)
    with unfilled():
        wanted = {n: tuple(t.shape) for n, t in ControlBranch(config).state_dict().items()}
    _check_input(path, stored, config)
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise _failed(path, AdapterFault.KEY_MISSING, f"it lacks {_names(missing)}")
    unknown = [name for name in stored if name not in wanted]
    if unknown:
        layers = ", ".join(str(layer) for layer in control_layers(config))
        raise _failed(
            path,
            AdapterFault.UNKNOWN_KEY,
            f"the model has no place for {_names(unknown)}; its hints go behind the double-stream "
            f"blocks {layers}",
        )
    for name, shape in stored.items():
        if shape != wanted[name]:
            raise _failed(
                path,
                AdapterFault.WRONG_BASE,
                f"it was made for another model: {name} is {list(shape)}, but the model's is "
                f"{list(wanted[name])}",
            )
        if header.tensors[name].dtype not in FLOAT_DTYPES:
            raise _failed(
                path,
                AdapterFault.WRONG_DTYPE,
                f"{name} is of type {header.tensors[name].dtype}, not a floating-point type",
            )
    return header


def _refuse_others(path: pathlib.Path, stored: Iterable[str]) -> None:
    """What other kinds of files are called; told before their keys are counted."""
    names = list(stored)
    if not names:
        raise _failed(path, AdapterFault.KEY_MISSING, "it holds no tensors")
    found = next((n for n in names if any(mark in n for mark in _IP_ADAPTER)), None)
    if found is not None:
        raise _failed(
            path,
            AdapterFault.UNSUPPORTED_KIND,
            f"it is an IP-Adapter or Redux of FLUX.1 ({found!r}), for which FLUX.2 has no "
            "counterpart: give the picture itself in reference_images",
        )
    found = next((n for n in names if n.startswith(_FLUX_1)), None)
    if found is not None:
        raise _failed(
            path,
            AdapterFault.WRONG_BASE,
            f"it is a ControlNet of FLUX.1 ({found!r}, 64-channel latents), and FLUX.2 has "
            "128-channel latents: use one made for FLUX.2, such as "
            "FLUX.2-dev-Fun-Controlnet-Union",
        )
    if any(mark in name for name in names for mark in _LORA):
        sentence = "it is a LoRA, not a control adapter: set type: lora"
        raise _failed(path, AdapterFault.UNSUPPORTED_KIND, sentence)


def _check_input(
    path: pathlib.Path, stored: dict[str, tuple[int, ...]], config: TransformerConfig
) -> None:
    shape, wanted = stored.get(_INPUT), control_channels(config)
    if shape is not None and len(shape) == 2 and shape[1] != wanted:
        raise _failed(
            path,
            AdapterFault.WRONG_BASE,
            f"it reads {shape[1]} channels, but a control token of this model has {wanted}: "
            f"{config.in_channels} of the map, 4 of the mask and {config.in_channels} of the "
            "masked picture",
        )


def _names(keys: list[str]) -> str:
    shown = ", ".join(repr(key) for key in keys[:_NAMED])
    return shown + (f" and {len(keys) - _NAMED} more keys" if len(keys) > _NAMED else "")


def _failed(path: pathlib.Path, fault: AdapterFault, sentence: str) -> AdapterLoadFailed:
    return AdapterLoadFailed(
        f"{path} cannot be used as a control adapter: {sentence}.",
        code=MISMATCH,
        param=str(path),
        details={"fault": fault.value},
    )
