"""The header of somebody's weights is read in time and memory that its length explains."""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hostile.limits.growth import MOST_GROWTH, growth
from safetensors import safe_open
from safetensors.torch import save_file

from calotype.serving.core.errors import AdapterLoadFailed
from calotype.serving.engine.lora.lora_file import linear_shapes, read_lora
from calotype.serving.engine.model.components import load_components
from calotype.serving.engine.sizing.weight_header import read_header
from calotype.serving.testing.models import save_random_lora, save_tiny_flux2


def tensor(begin: int, end: int, *shape: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


def entry(shape: str) -> str:
    return f'{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,4]}}}}'


HEADERS: dict[str, Callable[[int], tuple[str, int]]] = {
    "tensors": lambda n: (
        json.dumps({f"t{i}": tensor(4 * i, 4 * i + 4, 1) for i in range(n)}),
        4 * n,
    ),
    "the same bytes": lambda n: (json.dumps({f"t{i}": tensor(0, 4, 1) for i in range(n)}), 4),
    "no bytes": lambda n: (json.dumps({f"t{i}": tensor(0, 0, 0) for i in range(n)}), 0),
    "dimensions": lambda n: (entry(",".join(["9223372036854775807"] * n)), 4),
    "digits": lambda n: (entry("9" * n), 4),
    "a long name": lambda n: (json.dumps({"t" * n * 10: tensor(0, 4, 1)}), 4),
    "notes": lambda n: (json.dumps({"__metadata__": {f"k{i}": "v" for i in range(n)}}), 0),
    "notes in each other": lambda n: ('{"__metadata__":{"a":' + "[" * n + "]" * n + "}}", 0),
    "lists in each other": lambda n: ("[" * n, 0),
    "objects in each other": lambda n: ('{"a":' * n, 0),
    "infinity": lambda n: (entry("Infinity" + ",1" * n), 4),
}


def written(path: pathlib.Path, header: str, size: int) -> pathlib.Path:
    raw = header.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * size)
    return path


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_header_is_read_in_time_that_its_length_explains(
    header: Callable[[int], tuple[str, int]], tmp_path: pathlib.Path
) -> None:
    def read(n: int) -> None:
        path = written(tmp_path / "x.safetensors", *header(n))
        try:
            read_header(path, AdapterLoadFailed)
        except AdapterLoadFailed as refused:
            assert len(refused.message) < 700

    assert growth(read, 1_000, 8_000) < MOST_GROWTH


def test_infinity_is_no_number_of_rows(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path / "x.safetensors", entry("Infinity"), 4)
    with pytest.raises(AdapterLoadFailed, match="header is damaged"):
        read_header(path, AdapterLoadFailed)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 20_000_000))
        file.truncate(20_000_008)
    with pytest.raises(AdapterLoadFailed, match="at most 16,777,216 are read"):
        read_header(path, AdapterLoadFailed)


def test_the_notes_of_a_trainer_are_read_in_time_that_their_length_explains(
    tmp_path: pathlib.Path,
) -> None:
    model = save_tiny_flux2(tmp_path / "model")
    shapes = linear_shapes(load_components(model).denoiser)
    plain = save_random_lora(model, tmp_path / "plain.safetensors", rank=4, alpha=4.0)
    with safe_open(plain, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    module = max(read(plain, shapes), key=lambda name: name.count("."))
    hostile = tmp_path / "hostile.safetensors"

    def noted(alphas: Any) -> pathlib.Path:
        config["transformer.alpha_pattern"] = alphas
        save_file(tensors, hostile, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
        return hostile

    assert growth(lambda n: read(noted({f"k{i}": 1.0 for i in range(n)}), shapes)) < MOST_GROWTH
    named = read(noted({module.partition(".")[2]: 8.0, module: 2.0}), shapes)
    wanted = read(plain, shapes)[module].up * 2
    assert torch.equal(named[module].up, wanted), "the first name that fits"
    for damaged in ({"a": "much"}, {"a": 10**400}, [1]):
        with pytest.raises(AdapterLoadFailed, match="lora_adapter_metadata is damaged"):
            read(noted(damaged), shapes)


def read(path: pathlib.Path, shapes: Any) -> dict[str, Any]:
    return dict(read_lora(path, shapes, max_rank=64, dtype=torch.float32).layers)
