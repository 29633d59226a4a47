"""``PYTHONPATH=tests python -m simulation.run 1234 --trace``: replays seeds.

``FIRST:LAST`` runs many; the exit status says whether a promise was broken.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time

if __name__ == "__main__" and os.environ.get("PYTHONHASHSEED") != "0":
    # Sets of strings have another order in every process otherwise.
    os.environ |= {"PYTHONHASHSEED": "0", "OTEL_SDK_DISABLED": "true"}
    os.execv(sys.executable, [sys.executable, "-m", "simulation.run", *sys.argv[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation.run", description=__doc__)
    parser.add_argument("seeds", help="a seed, or FIRST:LAST (without LAST)")
    parser.add_argument("--trace", action="store_true", help="print what happened")
    parser.add_argument("--mutant", help="plant this bug first (see mutants.py)")
    parser.add_argument("--stop-after", type=int, default=5, help="seeds that fail; 0 = never")
    parser.add_argument("--replays", type=int, default=0, help="seeds that are run twice")
    given = parser.parse_args()
    first, _, last = given.seeds.partition(":")
    seeds = range(int(first), int(last) if last else int(first) + 1)
    from simulation.simulator import Simulator

    clock, started = time.monotonic, time.process_time()
    begun, failures = clock(), 0
    with Simulator() as simulator:
        if given.mutant:
            from simulation.mutants import plant

            plant(given.mutant)
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
    spent = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{seed - seeds.start + 1} seeds, {failures} broken, {clock() - begun:.1f} s, "
        f"{1000 * spent / (seed - seeds.start + 1):.1f} ms of CPU each, {peak} MB"
    )
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
