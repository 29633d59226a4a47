"""Merged adapters do the sum of what their inputs do."""

from __future__ import annotations

import json
import pathlib
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from calotype.serving.commands.cli import cli
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.engine.lora.adapter_card import read_card
from calotype.serving.engine.lora.adapter_export import convert_adapter
from calotype.serving.engine.lora.lora_file import read_lora
from calotype.serving.engine.sizing.adapter_origins import Origins, read_origins
from calotype.serving.engine.sizing.configs import TransformerConfig
from calotype.serving.engine.sizing.linear_layers import linear_layers
from calotype.serving.testing.models import TRANSFORMER

ROOT = pathlib.Path(__file__).parents[4]
SHAPES = linear_layers(TransformerConfig.from_json(TRANSFORMER))
Q, OUT = "transformer_blocks.0.attn.to_q", "proj_out"


def run(*words):
    result = CliRunner().invoke(cli, ["merge", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def adapter(path, seed, *, modules=(Q, OUT), rank=4, metadata=None, more=None):
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(more or {})
    for module in modules:
        rows, columns = SHAPES[module]
        key = f"transformer.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(tensors, str(path), metadata)
    return path


def change(path):
    layers = read_lora(path, SHAPES, max_rank=256, dtype=torch.float32).layers
    return {module: layer.up @ layer.down for module, layer in layers.items()}


@pytest.fixture
def pair(tmp_path):
    words = {"calotype.trigger_words": '["zorbl"]', "calotype.licence": "apache-2.0"}
    one = adapter(tmp_path / "one.safetensors", 1, metadata=words)
    return one, adapter(tmp_path / "two.safetensors", 2, modules=(Q,), rank=3, metadata=words)


def test_concatenation_is_the_sum_exactly(pair, tmp_path):
    one, two = pair
    output = tmp_path / "sum.safetensors"
    printed = run(f"{one}:0.5", f"{two}:-2", "--method", "concat", "-o", output)
    assert "rank 7, 2 layers; nothing is left out" in printed
    a, b, found = change(one), change(two), change(output)
    torch.testing.assert_close(found[Q], 0.5 * a[Q] - 2 * b[Q], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[OUT], 0.5 * a[OUT])
    card = read_card(output)
    assert (card.licence, card.trigger_words) == ("apache-2.0", ("zorbl",))
    from safetensors import safe_open

    with safe_open(str(output), framework="pt") as file:
        kept = json.loads(file.metadata()["calotype.merge"])
    digests = [f"sha256:{read_card(path).sha256}" for path in pair]
    assert [one["digest"] for one in kept["inputs"]] == digests
    assert [one["weight"] for one in kept["inputs"]] == [0.5, -2.0]


def test_a_merged_adapter_carries_the_pictures_of_all(tmp_path):
    own = {"basis": "own", "holder": "Ada"}
    made = [
        adapter(tmp_path / f"{n}.safetensors", n, metadata=origins.to_metadata())
        for n, origins in enumerate(
            [Origins("d" * 64, (("a" * 64, own),)), Origins("e" * 64, (("b" * 64, None),))]
        )
    ]
    output, copy = tmp_path / "sum.safetensors", tmp_path / "kohya.safetensors"
    run(*made, "--method", "concat", "-o", output)
    found = read_origins(output)
    assert found is not None
    assert found.pictures == (("a" * 64, own), ("b" * 64, None))
    convert_adapter(output, copy, "kohya", max_rank=256)
    assert read_origins(copy) == found, "a conversion keeps them"


def test_fewer_ranks_are_the_best_that_a_dense_decomposition_finds(pair, tmp_path):
    one, two = pair
    output = tmp_path / "svd.safetensors"
    printed = run(one, two, "--method", "svd", "--rank", 5, "-o", output)
    whole = change(one)[Q] + change(two)[Q]
    u, s, v = torch.linalg.svd(whole)
    best = (u[:, :5] * s[:5]) @ v[:5]
    torch.testing.assert_close(change(output)[Q], best, atol=1e-4, rtol=0)
    torch.testing.assert_close(change(output)[OUT], change(one)[OUT], atol=1e-4, rtol=0)
    left_out = float((whole - best).norm() / whole.norm())
    assert f"rank 5, 2 layers; at most {left_out:.2%} is left out" in printed
    assert load_file(str(output))[f"transformer.{Q}.lora_A.weight"].shape == (5, 64)


def test_blocks_choose_where_an_adapter_acts(pair, tmp_path):
    one, two = pair
    output = tmp_path / "m.safetensors"
    run(one, two, "--method", "concat", "-o", output, "--block", "1:transformer_blocks.*=0")
    torch.testing.assert_close(change(output)[Q], change(two)[Q])


def test_what_does_not_go_together_is_refused(pair, tmp_path):
    one, _ = pair
    output = tmp_path / "m.safetensors"
    wide = tmp_path / "wide.safetensors"
    q = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{q}.lora_A.weight": torch.zeros(1, 3072), f"{q}.lora_B.weight":
               torch.zeros(3072, 1)}, str(wide), {"calotype.licence": "mit"})  # fmt: skip
    with pytest.raises(InvalidRequest, match=r"different models.*3072x3072") as caught:
        run(one, wide, "--method", "concat", "-o", output)
    assert caught.value.code == "adapter_incompatible"
    dora = adapter(tmp_path / "dora.safetensors", 3, metadata={"calotype.licence": "mit"},
                   more={f"transformer.{OUT}.lora_magnitude_vector": torch.ones(16)})  # fmt: skip
    with pytest.raises(InvalidRequest, match=r"is a DoRA .'transformer.proj_out.lora_magnitude"):
        run(one, dora, "--method", "concat", "-o", output)
    based = [
        adapter(tmp_path / f"{base}.safetensors", 4, metadata={"modelspec.architecture": base})
        for base in ("flux-2-dev", "flux-2-klein")
    ]
    with pytest.raises(InvalidRequest, match=r"is for flux-2-dev, .* is for flux-2-klein"):
        run(*based, "--method", "concat", "-o", output)
    bound = adapter(tmp_path / "bound.safetensors", 5, metadata={"license": "gpl-3.0"})
    free = adapter(tmp_path / "free.safetensors", 5)
    with pytest.raises(InvalidRequest, match=r"free.safetensors says no licence"):
        run(bound, free, "--method", "concat", "-o", output)
    assert not output.exists()
    run(bound, free, "--method", "concat", "-o", output, "--licence", "gpl-3.0")
    assert read_card(output).licence == "gpl-3.0"


def test_the_examples_of_the_page_print_what_it_says(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "serving").symlink_to(ROOT / "serving")
    examples = re.findall(r"^\$ calotype merge (.+)\n((?:(?!\$ |```).*\n)*)", page, re.MULTILINE)
    assert len(examples) == 3
    for words, printed in examples:
        result = CliRunner().invoke(cli, ["merge", *words.split()])
        found = result.stdout
        if "--method svd" in words:  # whose last bits are the linear algebra library's
            found, printed = (re.sub(r"[0-9a-f]{64}", "DIGEST", text) for text in (found, printed))
        assert found == printed, words
    kept = (tmp_path / "shapes-merged" / "merge.json").read_text(encoding="utf-8")
    assert f"```\n{kept}```" in page
