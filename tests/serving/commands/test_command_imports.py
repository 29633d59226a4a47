"""Commands that draw nothing answer without importing torch or Ray, which takes seconds."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

HEAVY = {"torch", "ray", "diffusers", "transformers"}
LIGHT_START = {"httpx", "pydantic", "sqlalchemy", "numpy"}

RUN = """
import json, os, socket, sys
from click.testing import CliRunner
from calotype.serving.commands.cli import cli

def heavy():
    return sorted({name.partition(".")[0] for name in sys.modules} & set(watched))

watched, data_dir = json.loads(sys.argv[1]), sys.argv[2]
assert CliRunner().invoke(cli, ["--help"]).exit_code == 0
found = {"--help": heavy()}
from calotype.serving.weights.sources import BUILT_IN
adapter = str(BUILT_IN / "stripes.safetensors")
taken = socket.create_server(("127.0.0.1", 0))
port = str(taken.getsockname()[1])
for words, ends in (
    (["jobs", "--help"], True),
    (["plan", "--gpu", "a100-80gb"], True),
    (["moderate", "a red circle"], True),
    (["moderation", "review", "--help"], True),
    (["fetch", "--help"], True),
    (["adapters", "inspect", adapter, "--model", "shapes"], True),
    (["dataset", "check", data_dir], False),
    (["keys", "--data-dir", data_dir, "list"], True),
    (["serve", "-f", data_dir + "/nowhere.yaml", "--data-dir", data_dir], False),
    (["serve", "--port", port, "--data-dir", data_dir], False),
):
    result = CliRunner().invoke(cli, words)
    assert (result.exit_code == 0) is ends, (words, result.output, result.exception)
    found[" ".join(words[:2])] = heavy()
print(json.dumps(found))
"""


def test_commands_that_draw_nothing_import_no_torch_and_no_ray(tmp_path: pathlib.Path) -> None:
    watched = sorted(HEAVY | LIGHT_START)
    run = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(watched), str(tmp_path / "data")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["--help"] == []
    assert {command: set(names) & HEAVY for command, names in found.items()} == {
        command: set() for command in found
    }
