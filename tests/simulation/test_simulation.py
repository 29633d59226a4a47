"""Seeds of the simulation, in processes of their own: it replaces the clock and chance."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
QUICK = 25
MANY = int(os.environ.get("CALOTYPE_SIMULATION_SEEDS") or 500)
"""`make simulation` runs 20,000."""


def start(*arguments: str) -> subprocess.Popen[str]:
    """A process that runs seeds; it prints those that fail, and how long it took."""
    return subprocess.Popen(
        [sys.executable, "-m", "simulation.run", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_few_seeds_break_no_promise_and_can_be_replayed() -> None:
    process = start(f"0:{QUICK}", "--replays", "4")
    output = process.communicate()[0]
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_seeds_break_no_promise() -> None:
    halves = [start(f"0:{MANY // 2}"), start(f"{MANY // 2}:{MANY}")]
    outputs = [process.communicate()[0] for process in halves]
    print(*outputs, sep="\n")
    assert [process.returncode for process in halves] == [0, 0], outputs
