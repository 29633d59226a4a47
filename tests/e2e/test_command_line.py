"""The commands as a user types them: files, sentences, exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image
from samples.images import same_pixels

from calotype.serving.commands.cli import main
from calotype.serving.training.scene_classifier import look

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]

ROOT = pathlib.Path(__file__).parents[2]
MODELS = ROOT / "serving" / "weights" / "embedded"


@dataclass(frozen=True)
class Ran:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str, cwd: pathlib.Path = ROOT) -> Ran:
    """The command in this process, so that torch is imported once."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["calotype", *arguments])
        main()
        sys.exit(0)
    return Ran(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def start(*arguments: str) -> Ran:
    """The command as a process, where that is the subject."""
    done = subprocess.run(
        [sys.executable, "-m", "calotype.serving", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def pixels(file: pathlib.Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def refused(*arguments: str, by: Callable[..., Ran] = run) -> str:
    """The one sentence of a command that fails as it should."""
    result = by(*arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_generate_draws_the_same_picture_for_the_same_seed(tmp_path: pathlib.Path) -> None:
    for name in ("a.png", "b.png"):
        result = run(
            "generate", "a red circle", "-o", name, "--seed", "7", "--steps", "4", cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
    assert same_pixels(*((tmp_path / name).read_bytes() for name in ("a.png", "b.png")))
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (128, 128)


def test_generate_takes_an_adapter_and_several_pictures(tmp_path: pathlib.Path) -> None:
    common = ("generate", "a large red square", "--seed", "7", "-n", "2")
    run(*common, "-o", "plain.png", cwd=tmp_path)
    adapter = f"{MODELS / 'stripes.safetensors'}:1.0"
    result = run(*common, "-o", "striped.png", "--lora", adapter, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("plain", "striped"):
        assert (tmp_path / f"{name}-2.png").is_file()
    plain, striped = (pixels(tmp_path / f"{name}.png") for name in ("plain", "striped"))
    assert abs(plain - striped).mean() > 1


@pytest.mark.slow
def test_the_demo_draws_the_picture_that_the_readme_shows(tmp_path: pathlib.Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "calotype.serving.commands.demo"],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    ground, things, _ = look(pixels(tmp_path / "out" / "demo.png").astype(np.uint8))
    assert (ground, [(thing.shape, thing.color) for thing in things]) == (
        "red",
        [("heart", "white")],
    )
    assert "out/demo.png is drawn" in result.stdout


def test_generate_refuses_in_one_sentence(tmp_path: pathlib.Path) -> None:
    assert "multiples of 16" in refused("generate", "x", "--size", "99x99")
    assert "safety system" in refused(
        "generate", "a photograph of two people having explicit sexual intercourse"
    )
    assert ".png" in refused("generate", "x", "-o", "picture.gif")
    pickled = tmp_path / "style.pt"
    pickled.write_bytes(b"\x80\x04\x95" + b"\x00" * 64)
    assert "style.pt" in refused("generate", "x", "--lora", str(pickled))
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("damage", ["missing", "truncated", "pickled"])
def test_a_damaged_model_folder_is_named(tmp_path: pathlib.Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODELS / "shapes", folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    if damage == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "pickled":
        weights.with_suffix(".bin").write_bytes(b"\x80\x04\x95" + b"\x00" * 64)
    message = refused("generate", "a red circle", "--model", str(folder), "--size", "128x128")
    assert "transformer" in message


def test_moderate_prints_the_decision_as_json(tmp_path: pathlib.Path) -> None:
    allowed = json.loads(run("moderate", "a red circle").stdout)
    assert allowed["verdict"] == "ALLOW"
    assert not allowed["blocked"]
    Image.new("RGBA", (200, 200), (255, 0, 0, 128)).save(tmp_path / "red.png")
    image = json.loads(run("moderate", "--image", str(tmp_path / "red.png")).stdout)
    assert image["stage"] == "output"
    (tmp_path / "no.png").write_text("no picture")
    assert "no.png" in refused("moderate", "--image", str(tmp_path / "no.png"))


def test_evaluate_counts_every_label(tmp_path: pathlib.Path) -> None:
    data = tmp_path / "set.csv"
    data.write_text("text,label\na red circle,benign\na blue vase,benign\nhello there,odd label\n")
    report = json.loads(run("moderation", "evaluate", "--dataset", str(data), "--json").stdout)
    assert report["labels"]["benign"]["n"] == 2
    assert report["labels"]["odd label"]["n"] == 1
    assert "label" in refused("moderation", "evaluate", "--dataset", str(ROOT / "README.md"))


def test_plan_prints_a_table_or_says_what_would_fit() -> None:
    table = run("plan", "--model", "flux-2-dev", "--gpu", "a100-80gb").stdout
    assert "32.2" in table
    sentence = refused("plan", "--gpu", "rtx-4090-24gb", "--precision", "bfloat16")
    assert "int8" in sentence or "a100" in sentence


def test_keys_are_printed_once_and_never_stored(tmp_path: pathlib.Path) -> None:
    key = run("keys", "create", "--data-dir", str(tmp_path / "data")).stdout.strip()
    assert key.startswith("ct_live_")
    for file in (tmp_path / "data").iterdir():
        assert key.encode() not in file.read_bytes()


def test_serve_refuses_a_port_in_use(tmp_path: pathlib.Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        message = refused("serve", "--port", port, "--data-dir", str(tmp_path / "data"), by=start)
    assert port in message
    assert "--port" in message


def test_serve_refuses_wrong_manifests_before_it_starts(tmp_path: pathlib.Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("apiVersion: calotype.dev/v1alpha1\nkind: ImageModell\nmetadata: {name: a}\n")
    message = refused("serve", "-f", str(wrong), "--data-dir", str(tmp_path / "data"), by=start)
    assert "wrong.yaml" in message
    assert "ImageModell" in message


@pytest.mark.slow
def test_a_second_instance_on_the_same_data_folder_is_refused(service: Any) -> None:
    message = refused("serve", "--port", "1", "--data-dir", str(service.data_dir), by=start)
    assert "--port" in message or "--data-dir" in message
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    message = refused("serve", "--port", port, "--data-dir", str(service.data_dir), by=start)
    assert str(service.data_dir) in message
    assert service.draw(steps=2).startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_serve_with_a_sentence(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODELS / "shapes", folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    (tmp_path / "model.yaml").write_text(
        "apiVersion: calotype.dev/v1alpha1\nkind: ImageModel\nmetadata: {name: broken}\n"
        "spec: {source: {path: model}, precision: float32}\n"
    )
    options = ("--port", _free(), "--data-dir", str(tmp_path / "data"))
    message = refused("serve", "-f", str(tmp_path / "model.yaml"), *options, by=start)
    assert "diffusion_pytorch_model.safetensors" in message


def _free() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
