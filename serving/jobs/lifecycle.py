"""The states of a job and the ways between them.

    queued -> running -> succeeded | failed | canceled
       |  <- (lease lost, replica drained)
       +----------------> failed | canceled

A job has exactly one terminal state. The database enforces this with compare-and-set updates whose
conditions come from here.
"""

from __future__ import annotations

from typing import Literal, get_args

Status = Literal["queued", "running", "succeeded", "failed", "canceled"]

STATUSES: tuple[Status, ...] = get_args(Status)
OPEN: frozenset[Status] = frozenset({"queued", "running"})
TERMINAL: frozenset[Status] = frozenset({"succeeded", "failed", "canceled"})

_NEXT: dict[Status, frozenset[Status]] = {
    "queued": frozenset({"running", "failed", "canceled"}),
    "running": frozenset({"queued", "succeeded", "failed", "canceled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "canceled": frozenset(),
}


def may_follow(before: Status, after: Status) -> bool:
    """Whether a job in ``before`` may become ``after``."""
    return after in _NEXT[before]


def sources(after: Status) -> frozenset[Status]:
    """The states from which ``after`` can be reached: the condition of a compare-and-set."""
    return frozenset(before for before in STATUSES if may_follow(before, after))
