"""Figures of a model's report, as its status shows them."""

from __future__ import annotations

from typing import Any


def loaded_everywhere(report: Any, names: frozenset[str]) -> int:
    """Adapters that every replica that draws has."""
    if report is None:
        return 0
    ready = [state.get("adapters") or {} for state in report.states if state.get("ready")]
    if not ready:
        return 0
    return sum(
        all((adapters.get(name) or {}).get("state") == "ready" for adapters in ready)
        for name in names
    )


def rounded(report: Any, before: float | None) -> float | None:
    """The predicted wait; small changes are no reason to write a status."""
    if report is None or not report.reachable:
        return None
    now = round(report.queue_seconds)
    if (
        before is not None
        and abs(now - before) <= max(2.0, 0.2 * before)
        and (now > 0) == (before > 0)
    ):
        return before
    return float(now)
