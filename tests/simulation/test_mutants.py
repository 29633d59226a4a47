"""The simulation finds bugs that are planted: what it says of the rest is worth something."""

from __future__ import annotations

import pytest
from simulation.mutants import MUTANTS
from simulation.test_simulation import start

SEEDS = 2000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_planted_bug_is_found() -> None:
    names = sorted(MUTANTS)
    halves = [start(f"0:{SEEDS}", "--mutants", *half) for half in (names[::2], names[1::2])]
    outputs = [process.communicate()[0] for process in halves]
    print(*outputs, sep="\n")
    assert [process.returncode for process in halves] == [0, 0], outputs
