"""What goes wrong in one run, and when: a short plan that follows from the seed.

A fault strikes either at the n-th crossing of a boundary (a transaction, a commit, a call to the
blob store, a call of another process, a blocking call) or at a moment.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

BOUNDARIES: dict[str, tuple[tuple[str, ...], int]] = {
    "begin": (("error", "kill"), 60),
    "commit": (("error before", "error after", "kill before", "kill after"), 50),
    "blob": (("error before", "error after", "kill before", "kill after"), 16),
    "rpc": (("request lost", "answer lost", "kill callee", "kill caller"), 30),
    "thread": (("slow", "slow", "very slow"), 60),
}
"""Boundary -> what may happen there, and how many crossings a run has, about."""
_SOON = 14
"""Crossings within which an armed fault strikes."""
MOMENTS = (
    "kill gateway",
    "kill dispatcher",
    "kill generator",
    "kill encoder",
    "kill moderator",
    "pause dispatcher",
    "pause generator",
    "pause gateway",
    "database away",
    "blobs away",
    "encoder away",
    "moderator away",
    "receiver silent",
    "clock jumps",
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    what: str
    boundary: str = ""
    """Empty: it strikes at a moment."""
    at: float = 0.0
    """The number of the crossing, or seconds."""
    seconds: float = 0.0
    """How long it lasts; of a kill, until the process is started again."""
    armed: bool = False
    """Crossings are counted from `Faults.arm` on, and only those of what it names."""

    def __str__(self) -> str:
        where = f"{self.boundary} {self.at:.0f}" if self.boundary else f"{self.at:.1f} s"
        return f"{self.what} at {where}{' when armed' * self.armed} for {self.seconds:.1f} s"


def plan_faults(rng: random.Random, count: int, span: float, armed: float = 0.5) -> list[Fault]:
    """Args:
    count: of faults.
    span: seconds within which those of moments come.
    armed: share of those at crossings that wait for `Faults.arm`.
    """
    if count > 1 and rng.random() < 0.1:
        return _outage_with_death(rng, span)
    return [
        _crossing(rng, armed) if rng.random() < 0.3 + armed / 2 else _moment(rng, span)
        for _ in range(count)
    ]


def _outage_with_death(rng: random.Random, span: float) -> list[Fault]:
    """A part is away, so that leases are given back again and again; then their holder dies."""
    part, begun = rng.choice(("encoder", "moderator", "blobs")), span / 2 * rng.random()
    away = rng.choice((10.0, 45.0, 100.0))
    death = begun + away + rng.choice((-5.0, 2.0, 8.0)) + 4 * rng.random()
    return [
        Fault(f"{part} away", at=round(begun, 2), seconds=away),
        Fault("kill generator", at=round(death, 2), seconds=rng.choice((0.5, 6.0, 15.0))),
    ]


def _crossing(rng: random.Random, share_armed: float) -> Fault:
    boundary = rng.choice(sorted(BOUNDARIES))
    kinds, crossings = BOUNDARIES[boundary]
    what = rng.choice(kinds)
    seconds = rng.choice((0.2, 1.0, 4.0, 9.0))
    if what == "very slow":
        seconds = rng.choice((15.0, 40.0))
    armed = rng.random() < share_armed
    if armed and rng.random() < 0.4:
        boundary = rng.choice(("begin", "commit"))
        what = rng.choice(BOUNDARIES[boundary][0])
    share = min(crossings, _SOON) if armed else crossings
    return Fault(what, boundary, 1 + int(share * rng.random() ** 1.5), seconds, armed)


def _moment(rng: random.Random, span: float) -> Fault:
    what = rng.choice(MOMENTS)
    seconds = rng.choice((0.5, 2.0, 6.0, 15.0))
    if what.endswith("away"):
        seconds = rng.choice((2.0, 10.0, 45.0, 100.0))
    elif what.startswith("pause"):
        seconds = rng.choice((3.0, 14.0, 20.0, 30.0))
    elif what == "receiver silent":
        seconds = rng.choice((10.0, 400.0))
    elif what == "clock jumps":
        seconds = rng.choice((5.0, 20.0, 3600.0))
    return Fault(what, at=round(span * rng.random(), 2), seconds=seconds)


class Faults:
    """Counts crossings and says what goes wrong at each."""

    def __init__(self, plan: Sequence[Fault]) -> None:
        self.plan = list(plan)
        self.moments = [fault for fault in self.plan if not fault.boundary]
        self._waiting = {
            (fault.boundary, int(fault.at)): fault
            for fault in self.plan
            if fault.boundary and not fault.armed
        }
        self._counts = dict.fromkeys(BOUNDARIES, 0)
        self._unarmed = [fault for fault in self.plan if fault.armed]
        self._armed: dict[tuple[str, int], Fault] = {}
        self._armed_for = ""
        self._armed_counts = dict.fromkeys(BOUNDARIES, 0)

    def cross(self, boundary: str, process: str) -> Fault | None:
        """The fault of this crossing by a process, if it has one."""
        self._counts[boundary] = number = self._counts[boundary] + 1
        found = self._waiting.pop((boundary, number), None) if self._waiting else None
        if self._armed and process.startswith(self._armed_for):
            self._armed_counts[boundary] = number = self._armed_counts[boundary] + 1
            found = self._armed.pop((boundary, number), None) or found
        return found

    def arm(self, processes: str = "") -> None:
        """What this run is about begins now, in processes whose name begins so; heard once."""
        if self._unarmed:
            self._armed = {(fault.boundary, int(fault.at)): fault for fault in self._unarmed}
            self._armed_for = processes
            self._unarmed.clear()

    def stop(self) -> None:
        """Nothing goes wrong any more."""
        self._unarmed.clear()
        self._waiting.clear()
        self._armed.clear()
