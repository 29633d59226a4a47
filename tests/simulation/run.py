"""``PYTHONPATH=tests python -m simulation.run 1234 --trace``: replays seeds.

``FIRST:LAST`` runs many; the exit status says whether a promise was broken.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulation.simulator import Simulator

if __name__ == "__main__" and os.environ.get("PYTHONHASHSEED") != "0":
    # Sets of strings have another order in every process otherwise.
    os.environ |= {"PYTHONHASHSEED": "0", "OTEL_SDK_DISABLED": "true"}
    os.execv(sys.executable, [sys.executable, "-m", "simulation.run", *sys.argv[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation.run", description=__doc__)
    parser.add_argument("seeds", help="a seed, or FIRST:LAST (without LAST)")
    parser.add_argument("--trace", action="store_true", help="print what happened")
    parser.add_argument(
        "--mutants", nargs="*", help="look for these planted bugs; NAME=SEED: from there on"
    )
    parser.add_argument("--stop-after", type=int, default=5, help="seeds that fail; 0 = never")
    parser.add_argument("--replays", type=int, default=0, help="seeds that are run twice")
    given = parser.parse_args()
    first, _, last = given.seeds.partition(":")
    seeds = range(int(first), int(last) if last else int(first) + 1)
    started, begun = time.process_time(), time.monotonic
    since = begun()
    from simulation.simulator import Simulator

    with Simulator() as simulator:
        if given.mutants is None:
            runs, failures = _search(simulator, seeds, given)
        else:
            runs, failures = _find(simulator, seeds, given.mutants)
    spent = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{runs} seeds, {failures} failures, {begun() - since:.1f} s, "
        f"{1000 * spent / max(1, runs):.1f} ms of CPU each, {peak} MB"
    )
    return min(failures, 1)


def _search(simulator: Simulator, seeds: range, given: argparse.Namespace) -> tuple[int, int]:
    """Seeds that were run, and how many broke a promise."""
    failures = 0
    for seed in seeds:
        found = simulator.run(seed)
        if found.broken or given.trace:
            print(found.report(trace=given.trace or len(seeds) == 1), flush=True)
        failures += bool(found.broken)
        if seed - seeds.start < given.replays and simulator.run(seed).trace != found.trace:
            print(f"seed {seed} runs differently when it is run again")
            failures += 1
        if given.stop_after and failures >= given.stop_after:
            break
    return seed - seeds.start + 1, failures


def _find(simulator: Simulator, seeds: range, names: Sequence[str]) -> tuple[int, int]:
    """Seeds that were run, and how many planted bugs nobody found."""
    from simulation.mutants import MUTANTS, planted

    runs = missed = 0
    for word in names or MUTANTS:
        name, _, at = word.partition("=")
        with planted(name):
            for seed in range(int(at), seeds.stop) if at else seeds:
                runs += 1
                found = simulator.run(seed)
                if found.broken:
                    print(f"{name}: seed {seed}: {found.broken[0]}", flush=True)
                    break
            else:
                print(f"{name}: not found", flush=True)
                missed += 1
    return runs, missed


if __name__ == "__main__":
    sys.exit(main())
