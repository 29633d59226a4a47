"""Seeds of the simulation, in processes of their own: it replaces the clock and chance."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
QUICK, ALL = 25, 20_000


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
def test_twenty_thousand_seeds_break_no_promise() -> None:
    halves = [start(f"0:{ALL // 2}"), start(f"{ALL // 2}:{ALL}")]
    outputs = [process.communicate()[0] for process in halves]
    print(*outputs, sep="\n")
    assert [process.returncode for process in halves] == [0, 0], outputs
