"""Counts the faults of single rows, so that one that always fails is set aside."""

from __future__ import annotations

from collections import OrderedDict

from calotype.serving.observability import metrics

MOST = 3
"""Faults in a row after which a row is set aside."""
_REMEMBERED = 10_000


class RepeatedFaults:
    """Of rows of one kind, by ID, in one process.

    Args:
        kind: what they are, in the metric.
    """

    def __init__(self, kind: str, most: int = MOST) -> None:
        self._kind, self._most = kind, most
        self._counts: OrderedDict[str, int] = OrderedDict()

    def note(self, row: str) -> bool:
        """One more fault; whether the row shall be set aside now."""
        count = self._counts.pop(row, 0) + 1
        if count >= self._most:
            metrics.SET_ASIDE.labels(self._kind).inc()
            return True
        self._counts[row] = count
        if len(self._counts) > _REMEMBERED:
            self._counts.popitem(last=False)
        return False

    def clear(self, row: str) -> None:
        """It went well."""
        self._counts.pop(row, None)
