"""`calotype adapters`: what a file is, and the same adapter in another tool's layout."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from calotype.serving.commands.cli import cli
from calotype.serving.core.errors import (
    AdapterLoadFailed,
    CalotypeError,
    InvalidRequest,
    StorageFailed,
)
from calotype.serving.engine.lora.lora_file import read_lora
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.engine.sizing.linear_layers import linear_layers
from calotype.serving.engine.sizing.model_sizes import KNOWN_MODELS
from calotype.serving.testing.models import TRANSFORMER
from calotype.serving.weights.sources import BUILT_IN

ROOT = pathlib.Path(__file__).parents[3]
STRIPES = BUILT_IN / "stripes.safetensors"
SHAPES = linear_layers(TransformerConfig.from_json(TRANSFORMER))


def run(*words):
    result = CliRunner().invoke(cli, ["adapters", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def whole(tmp_path, *, dtype=torch.float32, alpha=None, metadata=None):
    """A file of every layer, of a rank of its own in each."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for place, (module, (rows, columns)) in enumerate(SHAPES.items()):
        rank = 1 + place % 5
        key = f"transformer.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator).to(dtype)
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator).to(dtype)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    path = tmp_path / "whole.safetensors"
    save_file(tensors, str(path), metadata)
    return path


def change(path):
    layers = read_lora(path, SHAPES, max_rank=256, dtype=torch.float32).layers
    return {module: layer.up @ layer.down for module, layer in layers.items()}


@pytest.mark.parametrize("alpha", [None, 7])
@pytest.mark.parametrize("to", ["diffusers", "comfy", "kohya"])
def test_a_converted_file_does_what_its_source_does(tmp_path, to, alpha):
    source = whole(tmp_path, alpha=alpha)
    expected = change(source)
    digest, target = run("convert", source, "--to", to).split()
    assert target == str(tmp_path / f"whole.{to}.safetensors")
    content = (tmp_path / f"whole.{to}.safetensors").read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()
    run("convert", target, "--to", "diffusers", "-o", tmp_path / "back.safetensors")
    for path in (pathlib.Path(target), tmp_path / "back.safetensors"):
        found = change(path)
        assert found.keys() == expected.keys()
        for module, delta in expected.items():
            torch.testing.assert_close(found[module], delta, atol=1e-6, rtol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "back.safetensors", "whole." + to + ".safetensors", "whole.safetensors",
    ]  # fmt: skip


def test_what_comes_back_from_another_layout_is_the_same_to_the_bit(tmp_path):
    source = whole(tmp_path, dtype=torch.bfloat16)
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    for to in ("kohya", "comfy"):
        run("convert", source, "--to", to, "-o", there, "--force")
        run("convert", there, "--to", "diffusers", "-o", back, "--force")
        given, found = load_file(str(source)), load_file(str(back))
        product = {k: t for k, t in given.items() if "lora_B" in k}
        assert given.keys() == found.keys()
        for key in product:
            assert found[key].dtype == torch.bfloat16
            a = key.replace("lora_B", "lora_A")
            assert torch.equal(
                found[key].float() @ found[a].float(), given[key].float() @ given[a].float()
            )


def test_an_alpha_that_a_short_type_would_round_is_kept_in_a_long_one(tmp_path):
    source = whole(tmp_path, dtype=torch.bfloat16, alpha=7)
    target = run("convert", source, "--to", "comfy").split()[1]
    assert {tensor.dtype for tensor in load_file(target).values()} == {torch.float32}


def test_magnitudes_are_written_where_the_layout_has_a_form_for_them(tmp_path):
    tensors, q = {}, "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors[f"{q}.lora_A.weight"], tensors[f"{q}.lora_B.weight"] = (
        torch.ones(2, 64),
        torch.ones(192, 2),
    )
    rows, columns = tmp_path / "rows.safetensors", tmp_path / "columns.safetensors"
    save_file(tensors | {f"{q}.dora_scale": torch.arange(192.0)[:, None]}, str(rows))
    save_file(tensors | {f"{q}.dora_scale": torch.arange(64.0)[None]}, str(columns))
    converted = load_file(run("convert", rows, "--to", "diffusers").split()[1])
    key = "transformer.transformer_blocks.0.attn.to_k.lora_magnitude_vector"
    assert torch.equal(converted[key], torch.arange(64.0, 128.0))
    back = run("convert", tmp_path / "rows.diffusers.safetensors", "--to", "kohya").split()[1]
    name = "lora_unet_double_blocks_0_img_attn_qkv.dora_scale"
    assert torch.equal(load_file(back)[name], torch.arange(192.0)[:, None])
    kept = run("convert", columns, "--to", "kohya").split()[1]
    assert torch.equal(load_file(kept)[name], torch.arange(64.0)[None])
    with pytest.raises(InvalidRequest, match=r"attn.to_q, diffusers knows magnitudes of rows only"):
        run("convert", columns, "--to", "diffusers")


def test_metadata_goes_along_but_for_what_is_not_true_any_more(tmp_path):
    metadata = {"modelspec.license": "apache-2.0", "ss_network_dim": "3", "sshs_model_hash": "x"}
    source = whole(tmp_path, metadata=metadata)
    target = run("convert", source, "--to", "kohya").split()[1]
    card = json.loads(run("inspect", target, "--json"))
    assert (card["licence"], card["layout"]) == ("apache-2.0", "kohya")
    from safetensors import safe_open

    with safe_open(target, framework="pt") as file:
        found = file.metadata()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert found == {
        "format": "pt", "modelspec.license": "apache-2.0",
        "calotype.converted_from": f"diffusers {digest}",
    }  # fmt: skip


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    source, target = whole(tmp_path), tmp_path / "out.safetensors"
    target.write_bytes(b"before")
    with pytest.raises(InvalidRequest, match="is there already"):
        run("convert", source, "--to", "kohya", "-o", target)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFailed, match="No space left"):
        run("convert", source, "--to", "kohya", "-o", target, "--force")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(KeyboardInterrupt))
    CliRunner().invoke(cli, ["adapters", "convert", str(source), "--to", "kohya", "-o", str(target),
                             "--force"])  # fmt: skip
    assert target.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.safetensors", "whole.safetensors",
    ]  # fmt: skip


def test_inspect_says_what_a_file_is(tmp_path):
    metadata = {
        "modelspec.trigger_phrase": "zorbl, striped",
        "modelspec.license": "apache-2.0",
        "modelspec.architecture": "flux2",
    }
    card = json.loads(run("inspect", whole(tmp_path, alpha=2, metadata=metadata), "--json"))
    assert card["layout"] == "diffusers" and card["kinds"] == ["lora"]
    assert (card["ranks"], card["alphas"]) == ([1, 5], [2.0, 2.0])
    assert (card["layers"], card["tensors"]) == (len(SHAPES), 3 * len(SHAPES))
    assert card["blocks"]["single_transformer_blocks.1"] == 2
    assert card["trigger_words"] == ["zorbl", "striped"]
    assert (card["licence"], card["base"]) == ("apache-2.0", "flux2")
    assert card["base_by_shape"] is None and card["coverage"] is None
    assert (
        card["sha256"] == hashlib.sha256((tmp_path / "whole.safetensors").read_bytes()).hexdigest()
    )


def test_inspect_reads_what_our_own_trainer_writes(tmp_path):
    said = {"calotype": json.dumps({"triggerWord": "zorbl", "baseDigest": "ab12"})}
    card = json.loads(run("inspect", whole(tmp_path, metadata=said), "--json"))
    assert (card["trigger_words"], card["base"]) == (["zorbl"], "ab12")


def test_inspect_asks_whether_a_file_fits_a_model():
    text = run("inspect", STRIPES, "--model", "shapes")
    assert "8 of 31 linear layers" in text and "4 of 12" in text
    with pytest.raises(AdapterLoadFailed, match="made for another model"):
        run("inspect", STRIPES, "--model", "flux-2-dev")


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_inspect_knows_the_published_model_by_its_layers(tmp_path, name):
    shapes = linear_layers(TransformerConfig.from_json(KNOWN_MODELS[name].denoiser))
    tensors = {}
    rows, columns = shapes["transformer_blocks.0.attn.to_q"]
    tensors["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] = torch.zeros(1, columns)
    tensors["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.zeros(rows, 1)
    save_file(tensors, str(tmp_path / "a.safetensors"))
    assert json.loads(run("inspect", tmp_path / "a.safetensors", "--json"))["base_by_shape"] == name


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.uint8,
    ],
)
def test_an_alpha_of_any_type_is_read(tmp_path, dtype):  # fmt: skip
    tensors = {"transformer.proj_out.lora_A.weight": torch.zeros(1, 64)}
    tensors["transformer.proj_out.lora_B.weight"] = torch.zeros(16, 1)
    alphas = []
    for value in (1.0, 12.0, 96.0):
        tensors["transformer.proj_out.alpha"] = torch.tensor(value).to(dtype)
        save_file(tensors, str(tmp_path / "a.safetensors"))
        alphas.append(json.loads(run("inspect", tmp_path / "a.safetensors", "--json"))["alphas"][0])
    assert alphas == [1.0, 12.0, 96.0]


def test_the_examples_of_the_page_print_what_it_says(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    name = "diffusion_model.single_blocks.1.linear2"
    first = torch.randn(4, 4, generator=generator)
    second = torch.randn(16, 64, generator=generator)
    factors = {f"{name}.lokr_w1": first, f"{name}.lokr_w2": second}
    monkeypatch.chdir(tmp_path)
    save_file(factors, "zorbl-lokr.safetensors")
    (tmp_path / "serving").symlink_to(ROOT / "serving")
    examples = re.findall(r"^\$ calotype (.+)\n((?:(?!\$ |```).*\n)*)", page, re.MULTILINE)
    assert len(examples) == 4
    for words, printed in examples:
        result = CliRunner().invoke(cli, words.split())
        found = result.output
        if isinstance(result.exception, CalotypeError):
            found = f"calotype: {result.exception}\n"
        assert found == printed, words
