"""The heads of safetensors files: names, types and shapes, without reading a tensor.

A file that is cut short, pickled or no safetensors at all is refused by name. Imports no torch, so
that commands that only look at a file answer at once. Reading the tensors is
`engine.model.weight_files`.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from calotype.serving.core.errors import EngineError
from calotype.serving.core.json_object import JsonObject

_MAX_HEADER_BYTES = 16 * 1024 * 1024
"""Read as JSON it takes ten times as much memory; that of a model of 32 billion parameters has
100 kB, and an adapter's with all that its trainer noted a megabyte."""
_PLAUSIBLE_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself: what begins with more is another kind of file."""
_MAX_DIMENSIONS, _MAX_NAME_CHARS = 16, 1000

_SAMPLES, _SAMPLE_BYTES = 64, 16 * 1024

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor.

    Attributes:
        dtype: in safetensors' words ("BF16").
        begin: its first byte, counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class WeightHeader:
    """The head of one safetensors file."""

    path: pathlib.Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int = 0
    """Bytes before the first tensor."""


def read_header(path: pathlib.Path, error: type[EngineError]) -> WeightHeader:
    """Reads and checks the header; reads no tensor.

    Raises:
        error: the file is missing, pickled, truncated or not safetensors; the message names it.
    """
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            _refuse_pickle(path, head, error)
            size = int.from_bytes(head, "little")
            if length < 8 or not 2 <= size <= _PLAUSIBLE_HEADER_BYTES:
                raise error(f"{path} is not a safetensors file.", param=str(path))
            if 8 + size > length:
                raise error(
                    f"{path} is truncated: its header should be {size} bytes long, but the whole "
                    f"file has {length}.",
                    param=str(path),
                )
            if size > _MAX_HEADER_BYTES:
                raise error(
                    f"The header of {path} has {size:,} bytes; at most {_MAX_HEADER_BYTES:,} are "
                    "read. Save the file without its trainer's notes.",
                    param=str(path),
                )
            raw = file.read(size)
    except FileNotFoundError:
        raise error(f"{path} is missing.", param=str(path)) from None
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror}.", param=str(path)) from fault
    try:
        content = json.loads(raw)
        metadata = {str(k): str(v) for k, v in content.pop("__metadata__", {}).items()}
        end, tensors = _tensor_table(content)
    except RecursionError:
        raise error(
            f"{path} is not a safetensors file: its header is nested too deeply.", param=str(path)
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as fault:
        raise error(
            f"{path} is not a safetensors file: its header is damaged ({str(fault)[:300]}).",
            param=str(path),
        ) from None
    if 8 + size + end != length:
        word = "truncated" if 8 + size + end > length else "damaged"
        raise error(
            f"{path} is {word}: it should be {8 + size + end} bytes long, but it has {length}.",
            param=str(path),
        )
    return WeightHeader(path, tensors, metadata, 8 + size)


def file_digest(path: pathlib.Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_number(header: WeightHeader, name: str) -> float | None:
    """The value of a tensor that holds one number; None if it holds another count of them.

    An alpha may be of any type, whole numbers among them.
    """
    info = header.tensors[name]
    if math.prod(info.shape) != 1 or info.dtype not in _NUMBERS:
        return None
    with header.path.open("rb") as file:
        file.seek(header.size + info.begin)
        return _NUMBERS[info.dtype](file.read(ITEM_BYTES[info.dtype]))


def _packed(form: str) -> Callable[[bytes], float]:
    return lambda raw: float(struct.unpack(f"<{form}", raw)[0])


def _float8(bits: int) -> float:
    """float8_e4m3fn: sign, four bits of exponent (bias 7), three of fraction; no infinity."""
    exponent, fraction = bits >> 3 & 15, bits & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    size = fraction / 512 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if bits & 128 else size


_NUMBERS: dict[str, Callable[[bytes], float]] = {
    "F64": _packed("d"),
    "F32": _packed("f"),
    "F16": _packed("e"),
    # The upper half of a float32, and of a float16.
    "BF16": lambda raw: _packed("f")(b"\0\0" + raw),
    "F8_E5M2": lambda raw: _packed("e")(b"\0" + raw),
    "F8_E4M3": lambda raw: _float8(raw[0]),
    "I64": _packed("q"),
    "I32": _packed("i"),
    "I16": _packed("h"),
    "I8": _packed("b"),
    "U8": _packed("B"),
}


def _refuse_pickle(path: pathlib.Path, head: bytes, error: type[EngineError]) -> None:
    # torch.save writes a zip archive ("PK"), older versions a bare pickle (0x80 and a protocol
    # number). A safetensors file starts with a 64-bit length, whose third to eighth bytes are
    # zero or nearly so; a pickle's are not.
    zipped = head.startswith(b"PK\x03\x04")
    pickled = len(head) == 8 and head[0] == 0x80 and head[1] in range(2, 6) and any(head[4:])
    if zipped or pickled:
        raise error(
            f"{path} is a pickled file, which may run code when it is opened; "
            "convert it to safetensors.",
            param=str(path),
        )


def _tensor_table(content: JsonObject) -> tuple[int, dict[str, TensorInfo]]:
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in content.items():
        if len(name) > _MAX_NAME_CHARS:
            raise ValueError(f"{name[:80]}... has more than {_MAX_NAME_CHARS} characters")
        if len(entry["shape"]) > _MAX_DIMENSIONS:
            raise ValueError(f"{name} has more than {_MAX_DIMENSIONS} dimensions")
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
        items = 1
        for n in shape:
            items *= n
        if dtype in ITEM_BYTES and end - begin != items * ITEM_BYTES[dtype]:
            raise ValueError(f"{name} has {end - begin} bytes for shape {list(shape)} of {dtype}")
        spans.append((begin, end))
        tensors[name] = TensorInfo(dtype, shape, begin)
    spans.sort()
    place = 0
    for begin, end in spans:
        if begin != place or end < begin:
            raise ValueError("the tensors do not lie end to end")
        place = end
    return place, tensors


def fingerprint(config: JsonObject, headers: Sequence[WeightHeader]) -> str:
    """A digest that tells models apart, of their sizes and some of their bytes.

    Not of all bytes: reading 64 GB twice would double the time that loading takes.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for header in headers:
        length = header.path.stat().st_size
        digest.update(f"{header.path.name} {length}".encode())
        with header.path.open("rb") as file:
            for place in range(0, length, max(_SAMPLE_BYTES, length // _SAMPLES)):
                file.seek(place)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def find_weight_headers(
    folder: pathlib.Path, stem: str, error: type[EngineError]
) -> list[WeightHeader]:
    """The safetensors file ``stem.safetensors`` of a folder, or all shards of its index.

    Raises:
        error: a file is missing, damaged, or there are only pickled weights.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if index.is_file() and not single.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise error(
                f"{index} is not an index of safetensors files ({fault}).", param=str(index)
            ) from None
        for shard in shards:
            if pathlib.PurePath(shard).name != shard or not shard.endswith(".safetensors"):
                raise error(
                    f"{index} names {shard!r}, which is no safetensors file beside it.",
                    param=str(index),
                )
        return [read_header(folder / shard, error) for shard in shards]
    if not single.exists():
        pickles = sorted(
            p.name
            for p in (folder.iterdir() if folder.is_dir() else ())
            if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        )
        if pickles:
            raise error(
                f"{folder / pickles[0]} is a pickled file, which may run code when it is opened; "
                f"convert it to {single.name}.",
                param=str(folder / pickles[0]),
            )
    return [read_header(single, error)]
