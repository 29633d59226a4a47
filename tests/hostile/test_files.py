"""What files say is data, and what they hold is for their owner."""

from __future__ import annotations

import json
import pathlib
import stat

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.engine.lora.lora_file import linear_shapes, read_lora
from calotype.serving.engine.model.components import load_components
from calotype.serving.testing.models import save_random_lora, save_tiny_flux2


def test_an_adapters_metadata_is_no_regular_expression(tmp_path: pathlib.Path) -> None:
    model = save_tiny_flux2(tmp_path / "model")
    shapes = linear_shapes(load_components(model).denoiser)
    plain = save_random_lora(model, tmp_path / "plain.safetensors", rank=4, alpha=4.0)
    with safe_open(plain, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    config["transformer.alpha_pattern"] = {"(([a-z_.0-9]+)+)+!": 400.0, ".*": 400.0}
    hostile = tmp_path / "hostile.safetensors"
    save_file(tensors, hostile, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    wanted, found = (
        read_lora(path, shapes, max_rank=64, dtype=torch.float32).layers
        for path in (plain, hostile)
    )
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name].up, found[name].up) for name in wanted)


def test_the_job_database_is_its_owners(tmp_path: pathlib.Path) -> None:
    tmp_path.chmod(0o755)
    Database.open(sqlite_url(tmp_path)).close()
    files = [file for file in tmp_path.iterdir() if file.name.startswith("calotype.db")]
    assert files and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
