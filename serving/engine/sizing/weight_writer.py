"""Safetensors files, written one tensor after the other and complete or not at all.

The library's own writer wants all tensors in memory, and orders metadata by chance, so that equal
files have different digests. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping

from calotype.serving.core.errors import StorageFailed
from calotype.serving.engine.sizing.weight_header import ITEM_BYTES, TensorInfo


def write_weights(
    path: pathlib.Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], memoryview],
    metadata: Mapping[str, str],
) -> str:
    """Writes a file beside its place, renames it, and returns its sha256.

    Args:
        read: the bytes of a tensor, asked for once each.

    Raises:
        StorageFailed: the disk is full or read-only; what was under the name stays.
    """
    # Longer items first: every tensor begins at a multiple of its own item.
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        info = tensors[name]
        begin, end = end, end + info.size
        header[name] = {
            "dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    part = path.with_name(f".{path.name}.part")
    try:
        try:
            with part.open("wb") as file:
                for piece in (len(head).to_bytes(8, "little"), head):
                    file.write(piece)
                    digest.update(piece)
                for name in order:
                    data = read(name)
                    file.write(data)
                    digest.update(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as fault:
        raise StorageFailed(
            f"{path} cannot be written: {fault.strerror}. What was there is unchanged.",
            param=str(path),
        ) from fault
    return digest.hexdigest()
