"""The tensors of safetensors files, and modules that are built without memory for them.

Files are checked by `engine.sizing.weight_header` before torch reads a byte of them. Called by
`components` and `lora_file`; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from calotype.serving.engine.sizing.weight_header import WeightHeader


def read_tensors(
    header: WeightHeader, names: set[str], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the named tensors as they are stored, on ``device``."""
    from safetensors import safe_open

    with safe_open(str(header.path), framework="pt", device=str(device)) as file:
        for name in header.tensors:
            if name in names:
                yield name, file.get_tensor(name)


def read_tensor(header: WeightHeader, name: str) -> torch.Tensor:
    """One tensor, read into memory of its own: nothing of the file stays mapped.

    ``name`` is of a type in `DTYPE_NAMES`.
    """
    info = header.tensors[name]
    dtype = next(dtype for dtype, word in DTYPE_NAMES.items() if word == info.dtype)
    found = torch.empty(info.shape, dtype=dtype)
    with header.path.open("rb", buffering=0) as file:
        file.seek(header.size + info.begin)
        left = tensor_bytes(found)
        while left:
            count = file.readinto(left)
            if not count:
                raise EOFError(f"{header.path} became shorter while it was read")
            left = left[count:]
    return found


DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""What safetensors calls torch's types."""


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor of the CPU as `engine.sizing.weight_writer` takes it, without a copy."""
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


class _NoInitialisation(TorchFunctionMode):
    """Leaves out torch.nn.init: random numbers on the meta device are lost, but drawing them makes
    torch import its compiler and sympy, which takes seconds and 200 MB.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


@contextmanager
def unfilled() -> Iterator[None]:
    """Within, modules are built without memory and without random numbers."""
    with _NoInitialisation(), torch.device("meta"):
        yield
