"""`calotype profile`, and the engine that finds what it left."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from calotype.serving.commands.cli import cli
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.engine.execution.step_profile import Profile
from calotype.serving.engine.model.components import load_components


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments):
    return CliRunner().invoke(cli, ["profile", *map(str, arguments)], catch_exceptions=False)


def test_what_the_command_measures_is_found_by_the_engine(
    model_folder, tmp_path, new_engine, make_request
):
    told = run(
        "--model", model_folder, "--data-dir", tmp_path, "--size", "64x64", "--rows", 3,
        "--device", "cpu", "--precision", "bfloat16",
    )  # fmt: skip
    assert told.exit_code == 0
    assert "<- chosen" in told.stdout and "Kept in" in told.stderr
    components = load_components(model_folder, precision="bfloat16")
    found = Profile.find(tmp_path, components)
    assert [(t.tokens, t.rows) for t in found.times] == [(48, 1), (48, 2), (48, 3)]
    assert Profile.find(tmp_path, load_components(model_folder)) is None, "another precision"
    # Written as if two images were much better than one, and three no better than two.
    (path,) = (tmp_path / "profiles").iterdir()
    content = json.loads(path.read_text())
    for time, seconds in zip(content["times"], (1.0, 1.1, 1.65), strict=True):
        time["seconds"] = seconds
    path.write_text(json.dumps(content))
    for folder, most in ((tmp_path, 2), (tmp_path / "empty", 4)):
        engine = new_engine(components, data_folder=folder)
        for i in range(4):
            engine.add(make_request(f"r{i}", steps=1))
        engine.run()
        assert max(engine.batches) == most


def test_usual_sizes_are_measured_where_none_is_given(tmp_path):
    told = run("--data-dir", tmp_path, "--rows", 1, "--device", "cpu")
    assert told.exit_code == 0
    (path,) = (tmp_path / "profiles").iterdir()
    # 64x64 and 128x128 with 32 text tokens; 256x256 is drawn as 128x128 and enlarged.
    assert [(t.tokens, t.rows) for t in Profile.load(path).times] == [(48, 1), (96, 1)]


@pytest.mark.parametrize(("size", "message"), [("64", "WIDTHxHEIGHT"), ("8x8", "too small")])
def test_sizes_that_cannot_be_drawn_are_refused(tmp_path, size, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        run("--data-dir", tmp_path, "--size", size)
    assert "--size" in str(caught.value)
    assert not any(tmp_path.iterdir())
