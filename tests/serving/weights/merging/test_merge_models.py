"""Merged models: the values by definition, within two shards of memory, whole or not at all."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from calotype.serving.commands.cli import cli
from calotype.serving.core.errors import InvalidRequest, ModelLoadFailed, StorageFailed
from calotype.serving.engine.model.components import load_components
from calotype.serving.testing.models import save_tiny_flux2
from calotype.serving.weights.merging.licences import merged_licence

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of one base: only their denoisers differ."""
    folder = tmp_path_factory.mktemp("models")
    first = save_tiny_flux2(folder / "a", seed=1)
    (first / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for name, seed in (("b", 2), ("base", 3)):
        other = save_tiny_flux2(folder / f"other-{name}", seed=seed)
        shutil.copytree(first, folder / name)
        shutil.copy(other / WEIGHTS, folder / name / WEIGHTS)
    return folder


def run(*words):
    result = CliRunner().invoke(cli, ["merge", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def weights(folder):
    return load_file(str(folder / WEIGHTS))


def ties(base, values, weights, density):
    """The paper in a few lines."""
    trimmed = []
    for value, weight in zip(values, weights, strict=True):
        difference = value - base
        order = difference.abs().flatten().argsort(descending=True)
        kept = torch.zeros(difference.numel())
        kept[order[: round(density * difference.numel())]] = 1
        trimmed.append(difference * kept.view_as(difference) * weight)
    stacked = torch.stack(trimmed)
    sign = stacked.sum(0).sign()
    agrees = (stacked.sign() == sign) & (stacked != 0)
    shares = torch.tensor(weights).view(-1, *[1] * base.ndim) * agrees
    total = (stacked * agrees).sum(0)
    return base + torch.where(shares.sum(0) > 0, total / shares.sum(0), torch.zeros(()))


def slerp(a, b, share):
    a64, b64 = a.double().flatten(), b.double().flatten()
    angle = torch.arccos((a64 @ b64) / (a64.norm() * b64.norm()))
    mixed = ((1 - share) * angle).sin() * a64 + (share * angle).sin() * b64
    return (mixed / angle.sin()).view_as(a).float()


METHODS = {
    "linear": lambda a, b, base: 0.25 * a + 0.75 * b,
    "slerp": lambda a, b, base: slerp(a, b, 0.75),
    "task": lambda a, b, base: base + 0.5 * (a - base) + 1.5 * (b - base),
    "ties": lambda a, b, base: ties(base, [a, b], [0.5, 1.5], 0.4),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_value_is_what_the_method_says(models, tmp_path, method):
    needs = ["--base", models / "base"] if method in ("task", "ties") else []
    inputs = [f"{models / 'a'}:0.5", f"{models / 'b'}:1.5"]
    run(*inputs, "--method", method, *needs, "--density", 0.4, "-o", tmp_path / "m")
    a, b, base, found = (weights(f) for f in (*(models / n for n in ("a", "b", "base")),
                                              tmp_path / "m"))  # fmt: skip
    assert found.keys() == a.keys()
    for name, value in found.items():
        expected = METHODS[method](a[name], b[name], base[name])
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4, msg=name)
    model = load_components(tmp_path / "m")
    assert model.denoiser.proj_out.weight.shape == found["proj_out.weight"].shape


def test_dare_drops_by_lot_and_keeps_the_mean(models, tmp_path):
    words = ["--method", "dare", "--base", models / "base", "--density", 0.25]
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        run(models / "a", *words, "--seed", seed, "-o", tmp_path / name)
    a, base = weights(models / "a"), weights(models / "base")
    one, again, two = (weights(tmp_path / name) for name in ("one", "again", "two"))
    for name, value in one.items():
        assert torch.equal(value, again[name])
    name = "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"
    kept = one[name] != base[name]
    assert 0.23 < kept.float().mean() < 0.27 and not torch.equal(one[name], two[name])
    changed = base[name] + 4 * (a[name] - base[name])
    torch.testing.assert_close(one[name][kept], changed[kept], atol=1e-5, rtol=1e-4)


def test_a_model_with_itself_is_itself(models, tmp_path):
    for method in ("linear", "slerp"):
        run(models / "a", models / "a", "--method", method, "-o", tmp_path / method)
        for name, value in weights(tmp_path / method).items():
            torch.testing.assert_close(value, weights(models / "a")[name], atol=1e-6, rtol=0)


def test_blocks_have_weights_of_their_own(models, tmp_path):
    run(models / "a", f"{models / 'b'}:1", "--method", "linear", "-o", tmp_path / "m",
        "--block", "2:single_transformer_blocks.*=0", "--block", "1:proj_out*=0")  # fmt: skip
    a, b, found = weights(models / "a"), weights(models / "b"), weights(tmp_path / "m")
    single, out = "single_transformer_blocks.1.attn.to_out.weight", "proj_out.weight"
    assert torch.equal(found[single], a[single]) and torch.equal(found[out], b[out])
    torch.testing.assert_close(found["x_embedder.weight"],
                               (a["x_embedder.weight"] + b["x_embedder.weight"]) / 2)  # fmt: skip


def test_recipe_licence_and_digests_go_with_the_result(models, tmp_path):
    run(models / "a", f"{models / 'b'}:2", "--method", "linear", "-o", tmp_path / "m")
    kept = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert kept["method"] == "linear" and kept["licence"] == "apache-2.0"
    assert [(one["name"], one["weight"]) for one in kept["inputs"]] == [("a", 1.0), ("b", 2.0)]
    assert len({one["digest"] for one in kept["inputs"]}) == 2
    from safetensors import safe_open

    with safe_open(str(tmp_path / "m" / WEIGHTS), framework="pt") as file:
        assert json.loads(file.metadata()["calotype.merge"]) == kept
    # A merge of a merge knows its licence too.
    printed = run(tmp_path / "m", models / "a", "--method", "linear", "-o", tmp_path / "n")
    assert "licence: apache-2.0" in printed
    assert json.loads((tmp_path / "n" / "merge.json").read_text())["licence"] == "apache-2.0"


def big_model(folder, seed, shards=3, size=600_000, tensors=8):
    """A folder whose denoiser is much larger than all else, in three shards."""
    save_tiny_flux2(folder, seed=1)
    part = folder / "transformer"
    (part / "diffusion_pytorch_model.safetensors").unlink()
    generator, places = torch.Generator().manual_seed(seed), {}
    for shard in range(shards):
        name = f"diffusion_pytorch_model-{shard + 1:05}-of-{shards:05}.safetensors"
        held = {
            f"layer.{shard}.{i}": torch.randn(size, generator=generator) for i in range(tensors)
        }
        save_file(held, str(part / name))
        places |= dict.fromkeys(held, name)
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return folder


MEASURE = """
import pathlib, re, sys
from calotype.serving.weights.merging.models import merge_models
from calotype.serving.weights.merging.recipe import MergeInput, MergeRecipe

def merge(*names):
    base, *inputs = (MergeInput(folder / name) for name in names)
    merge_models(MergeRecipe("ties", tuple(inputs), base=base), folder / ("merged-" + names[0]))

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

folder = pathlib.Path(sys.argv[1])
merge("small", "small", "small")  # everything is imported and warm
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = kilobytes("VmRSS")
merge("large", "a", "b")
print(1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of /proc")
def test_three_shards_are_merged_in_the_memory_of_two(tmp_path):
    """Two inputs and a base: what ties keeps of a tensor is the most that any method keeps."""
    save_tiny_flux2(tmp_path / "small")
    for seed, name in enumerate(("large", "a", "b")):
        big_model(tmp_path / name, seed)
    shard = os.path.getsize(
        tmp_path / "a/transformer/diffusion_pytorch_model-00001-of-00003.safetensors"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    grown = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], check=True,
                           capture_output=True, text=True, env=environment)  # fmt: skip
    shards = list((tmp_path / "merged-large" / "transformer").glob("*.safetensors"))
    assert len(shards) == 3 and all(file.stat().st_size > shard for file in shards)
    print(f"{int(grown.stdout) / shard:.2f} shards")
    assert int(grown.stdout) <= 2 * shard, f"{int(grown.stdout) / shard:.2f} shards"


def test_an_interrupted_merge_leaves_nothing(models, tmp_path, monkeypatch):
    from calotype.serving.weights.merging import models as merging

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    words = [models / "a", models / "b", "--method", "linear", "-o", tmp_path / "m"]
    with pytest.raises(StorageFailed, match="No space left on device"):
        run(*words)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "merge_tensors", interrupted)
    CliRunner().invoke(cli, ["merge", *map(str, words)])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / ".m.part").mkdir()  # a killed one
    run(*words)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with pytest.raises(InvalidRequest, match="is there already"):
        run(*words)


def test_models_of_different_bases_are_refused(models, tmp_path):
    klein = save_tiny_flux2(tmp_path / "klein", klein=True)
    with pytest.raises(InvalidRequest, match=r"guidance_embedder.*missing there") as caught:
        run(models / "a", klein, "--method", "linear", "-o", tmp_path / "m")
    assert caught.value.code == "adapter_incompatible"
    other = save_tiny_flux2(tmp_path / "other", seed=9)
    with pytest.raises(InvalidRequest, match="has another vae than"):
        run(models / "a", other, "--method", "linear", "-o", tmp_path / "m")
    changed = tmp_path / "changed"
    shutil.copytree(models / "b", changed)
    config = changed / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 100', '"rope_theta": 200'))
    with pytest.raises(InvalidRequest, match=r"rope_theta of transformer/config.json is 200 there"):
        run(models / "a", changed, "--method", "linear", "-o", tmp_path / "m")
    with pytest.raises(ModelLoadFailed):
        run(models / "a", tmp_path / "nowhere", "--method", "linear", "-o", tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a", "--method", "linear"], "two inputs or more"),
        (["a", "b", "a", "--method", "slerp"], "slerp is between two models; got 3"),
        (["a", "b", "--method", "ties"], "name it with --base"),
        (["a", "b", "--method", "linear", "--base", "base"], "linear knows no base"),
        (["a", "b", "--method", "ties", "--base", "base", "--density", "0"], "density must be"),
        (["a:0", "b:0", "--method", "linear"], "not all 0"),
        (["a", "b", "--method", "linear", "--block", "3:x=1"], "N from 1 to 2"),
    ],
)
def test_what_makes_no_merge_is_refused(models, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(models)
    with pytest.raises(InvalidRequest, match=says):
        run(*words, "-o", tmp_path / "m")


APACHE, DEV, KLEIN, OTHER = (
    "apache-2.0", "flux-2-dev-non-commercial-license", "flux-non-commercial-license", "gpl-3.0",
)  # fmt: skip


@pytest.mark.parametrize(
    ("licences", "result"),
    [
        ([None, None], None),
        ([APACHE, "MIT"], "apache-2.0"),
        ([APACHE, DEV], "flux-dev-non-commercial-license"),
        ([DEV, KLEIN], "flux-dev-non-commercial-license"),
        ([OTHER, OTHER], "gpl-3.0"),
    ],
)
def test_the_licence_of_the_result(licences, result):
    assert merged_licence(dict(enumerate(licences)), commercial=False) == result


@pytest.mark.parametrize(
    ("licences", "commercial", "says"),
    [
        ([APACHE, None], False, "1 says no licence, and 0 is under apache-2.0"),
        ([DEV, OTHER], False, "0 is under flux-dev-non-commercial-license and 1 is under gpl-3.0"),
        ([APACHE, DEV], True, "commercial use is asked for, but 1 is under flux-dev-non-comm"),
    ],
)
def test_licences_that_forbid_a_merge(licences, commercial, says):
    with pytest.raises(InvalidRequest, match=says) as caught:
        merged_licence(dict(enumerate(licences)), commercial=commercial)
    assert caught.value.code == "licence_conflict"


def test_numbers_that_are_none_stop_a_merge(models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(models / "b", broken)
    tensors = weights(broken)
    tensors["proj_out.weight"][0, 0] = float("nan")
    save_file(tensors, str(broken / WEIGHTS))
    with pytest.raises(ModelLoadFailed, match=r"proj_out.weight of the result holds NaN"):
        run(models / "a", broken, "--method", "linear", "-o", tmp_path / "m")
    assert pathlib.Path(tmp_path / "m").exists() is False
