"""The classes of diffusers that the engine uses, imported when first needed.

Importing one model of diffusers imports nearly all of it, and with it transformers, PEFT, SciPy,
torch's compiler and SymPy: 10 s and 300 MB that a generator never uses. So diffusers is imported
here as if those optional libraries were not installed, which it supports, and under a name of its
own: whoever imports diffusers in the same process still gets all of it. Where diffusers has been
imported already (in tests, in training), that one is used.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import logging
import pathlib
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

logger = logging.getLogger(__name__)

_DENOISER = "diffusers.models.transformers.transformer_flux2"
_VAE = "diffusers.models.autoencoders.autoencoder_kl_flux2"
_FLOW_EULER = "diffusers.schedulers.scheduling_flow_match_euler_discrete"
_FLOW_HEUN = "diffusers.schedulers.scheduling_flow_match_heun_discrete"
_DPM_SOLVER = "diffusers.schedulers.scheduling_dpmsolver_multistep"
_UNIPC = "diffusers.schedulers.scheduling_unipc_multistep"
_LORA = "diffusers.loaders.lora_conversion_utils"

_COPY = "calotype_diffusers"
"""What our copy of the package is called in sys.modules."""

_ABSENT = ("_accelerate", "_peft", "_scipy", "_transformers")
"""Optional libraries: names of the flags in diffusers.utils.import_utils."""

_EAGER = ("hooks", "models.autoencoders", "models.transformers", "quantizers")
"""Packages whose __init__ imports every module in them."""

_private: dict[str, types.ModuleType] = {}
_lock = threading.Lock()


def denoiser_class() -> Any:
    """diffusers' Flux2Transformer2DModel."""
    return _module(_DENOISER).Flux2Transformer2DModel


def rotary_function() -> Any:
    """diffusers' apply_rotary_emb."""
    return _module(_DENOISER).apply_rotary_emb


def vae_class() -> Any:
    """diffusers' AutoencoderKLFlux2."""
    return _module(_VAE).AutoencoderKLFlux2


def flow_euler_class() -> Any:
    """diffusers' FlowMatchEulerDiscreteScheduler."""
    return _module(_FLOW_EULER).FlowMatchEulerDiscreteScheduler


def flow_heun_class() -> Any:
    """diffusers' FlowMatchHeunDiscreteScheduler."""
    return _module(_FLOW_HEUN).FlowMatchHeunDiscreteScheduler


def dpm_solver_class() -> Any:
    """diffusers' DPMSolverMultistepScheduler."""
    return _module(_DPM_SOLVER).DPMSolverMultistepScheduler


def unipc_class() -> Any:
    """diffusers' UniPCMultistepScheduler."""
    return _module(_UNIPC).UniPCMultistepScheduler


def lora_converter(form: str) -> Any:
    """diffusers' converter of FLUX.2 LoRA keys: of "kohya" or of "diffusion_model" files."""
    name = {
        "kohya": "_convert_kohya_flux2_lora_to_diffusers",
        "diffusion_model": "_convert_non_diffusers_flux2_lora_to_diffusers",
    }[form]
    return getattr(_module(_LORA), name)


def _module(name: str) -> types.ModuleType:
    with _lock:
        if "diffusers" in sys.modules and not _private:
            return importlib.import_module(name)
        if not _private:
            try:
                _private.update(_import_privately())
            except (ImportError, AttributeError, TypeError, RuntimeError) as fault:
                logger.warning("diffusers cannot be imported in part, importing all: %r", fault)
                return importlib.import_module(name)
        if name not in _private:
            _private[name] = importlib.import_module(_COPY + name.removeprefix("diffusers"))
        return _private[name]


def _import_privately() -> dict[str, types.ModuleType]:
    """The modules by their public names, imported as parts of the package `_COPY`."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None or spec.origin is None:
        raise ImportError("diffusers is not installed")
    folder = pathlib.Path(spec.origin).parent
    copy = importlib.util.spec_from_file_location(
        _COPY, spec.origin, submodule_search_locations=[str(folder)]
    )
    if copy is None or copy.loader is None:
        raise ImportError("diffusers cannot be imported under another name")
    with _without_compiler():
        root = sys.modules[_COPY] = importlib.util.module_from_spec(copy)
        copy.loader.exec_module(root)
        flags = importlib.import_module(f"{_COPY}.utils.import_utils")
        for flag in _ABSENT:
            setattr(flags, f"{flag}_available", False)
        # Computed from those flags while they were set; every forward of a model looks at it.
        utilities = importlib.import_module(f"{_COPY}.utils")
        setattr(utilities, "USE_PEFT_BACKEND", False)  # noqa: B010
        for package in _EAGER:
            sys.modules[f"{_COPY}.{package}"] = _hollow(package, folder)
        return {
            name: importlib.import_module(_COPY + name.removeprefix("diffusers"))
            for name in (_DENOISER, _VAE, _FLOW_EULER, _LORA)
        }


def _hollow(package: str, folder: pathlib.Path) -> types.ModuleType:
    """A package whose modules can be imported without its __init__."""
    module = types.ModuleType(f"{_COPY}.{package}")
    module.__path__ = [str(folder.joinpath(*package.split(".")))]
    if package == "quantizers":
        # Named in signatures and isinstance checks of models that are loaded quantised; ours are
        # not, and nothing is an instance of these.
        for name in ("DiffusersAutoQuantizer", "DiffusersQuantizer"):
            setattr(module, name, type(name, (), {}))
    return module


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Within, nothing imports torch._dynamo or SymPy."""
    saved = {
        name: sys.modules.get(name)
        for name in ("torch._dynamo", "torch.nn.attention.flex_attention")
    }
    disable = torch.compiler.disable
    if saved["torch._dynamo"] is None:
        # Python's own way to say "cannot be imported"; diffusers has a fallback for it.
        sys.modules["torch._dynamo"] = None  # type: ignore[assignment]
        setattr(torch.compiler, "disable", _leave_alone)  # noqa: B010
    if saved["torch.nn.attention.flex_attention"] is None:
        # One of many attention backends, which is chosen by name and never by us.
        name = "torch.nn.attention.flex_attention"
        sys.modules[name] = types.ModuleType(name)
    try:
        yield
    finally:
        setattr(torch.compiler, "disable", disable)  # noqa: B010
        for name, module in saved.items():
            if module is None:
                sys.modules.pop(name, None)


def _leave_alone(
    function: Callable[..., Any] | None = None, recursive: bool = True, **_: object
) -> Any:
    """torch.compiler.disable for functions that are never compiled."""
    return function if function is not None else _leave_alone


def build(cls: Any, config: Mapping[str, Any]) -> Any:
    """A model of diffusers from its `config.json`; entries that the class lacks are left out.

    ConfigMixin.from_config does this too, but imports the public diffusers on the way.
    """
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in config.items() if key in known})
