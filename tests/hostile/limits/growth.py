"""How much longer each character of a long input takes than one of a short input."""

from __future__ import annotations

import time
from collections.abc import Callable

SHORT, LONG = 2_000, 16_000
MOST_GROWTH = 3.0
"""n log n takes 1.3 times as long per character here; a quadratic reading takes 8 times."""


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of this thread, the least of three: other processes do not count."""
    best = float("inf")
    for _ in range(3):
        begun = time.thread_time()
        call()
        best = min(best, time.thread_time() - begun)
    return best


def growth(run: Callable[[int], object], short: int = SHORT, long: int = LONG) -> float:
    run(short)
    least = max(seconds(lambda: run(short)), 0.002)
    return seconds(lambda: run(long)) / least / (long / short)
