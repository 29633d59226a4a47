"""Runs seeds: virtual time, chance and pictures in place of the real ones; checks each run.

Used as a context manager, in a process of its own: it replaces `time.time` and others.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from simulation.faults import Fault, plan_faults
from simulation.invariants import broken_promises
from simulation.loop import Stuck
from simulation.parts.database import simulated_database
from simulation.parts.pictures import blurred, given_pixels, picture_file, shown_in
from simulation.parts.receiver import URL
from simulation.scenario import Scenario
from simulation.world import World

from calotype.moderation.errors import ImageError
from calotype.serving.api.routes import takedowns
from calotype.serving.core.protocols import SystemClock
from calotype.serving.database.database import Database
from calotype.serving.dispatch.estimator import Estimator
from calotype.serving.images import encode
from calotype.serving.jobs.events import TERMINAL_EVENTS
from calotype.serving.jobs.records import KeyRecord
from calotype.serving.webhooks import safe_http, sender

EPOCH = 1_800_000_000.0
KINDS = (*("plain",) * 6, *("delete",) * 3, *("references",) * 2, *("review",) * 2)
KINDS += (*("takedown",) * 3, "batch")
ARMED = 0.75
"""Share of faults that wait for the takedown, the deletion or the decision that a run is about."""
LAG = 6.0
FAULTS_UNTIL = 14.0
"""Seconds of a run in which things begin to go wrong."""
LONGEST = 2400.0
"""Seconds of virtual time that a run may take."""
RETRY_DELAYS = (5.0, *(12.0,) * 8)
"""Of webhooks: days of waiting show nothing that these do not."""
RUNS_PER_COLLECTION = 25
"""Of what runs left in cycles."""
SETTLE = 40.0
"""Seconds for which sweeps go on after everybody has gone, where there is something to sweep."""


@dataclass
class Run:
    """What became of one seed."""

    seed: int
    kind: str
    plan: list[Fault]
    broken: list[str]
    """Promises that were broken; empty = none."""
    trace: list[str] = field(default_factory=list)
    steps: int = 0

    def report(self, *, trace: bool = True) -> str:
        lines = [f"seed {self.seed} ({self.kind})", *(f"  fault: {fault}" for fault in self.plan)]
        lines += [f"  BROKEN: {text}" for text in self.broken]
        if trace:
            lines += ["  what happened:", *(f"    {line}" for line in self.trace)]
        return "\n".join(lines)


class Simulator:
    """Runs seeds one after the other."""

    def __init__(self) -> None:
        self._world: World | None = None
        self._runs = 0
        self._rng = random.Random(0)
        self._stack = contextlib.ExitStack()
        self.database = simulated_database()

    def __enter__(self) -> Simulator:
        logging.disable(logging.CRITICAL)
        for target, name, value in self._replacements():
            self._stack.enter_context(mock.patch.object(target, name, value))
        self._stack.enter_context(warnings.catch_warnings())
        # Of tasks whose process was killed: nothing awaits them any more.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        self._keys = self._prepared()
        gc.collect()
        gc.freeze()
        gc.disable()  # a run lasts shorter than it takes to look through what it made
        return self

    def __exit__(self, *exc: object) -> None:
        gc.enable()
        gc.unfreeze()
        gc.collect()  # what killed processes left complains unheard
        self._stack.close()
        logging.disable(logging.NOTSET)

    def run(self, seed: int, *, faults: int | None = None) -> Run:
        """Runs one seed.

        Args:
            faults: how many things go wrong; None = as the seed says.
        """
        rng = random.Random(seed)
        self._rng = random.Random(f"chance {seed}")
        random.seed(seed)
        kind = rng.choice(KINDS)
        acts = kind in ("takedown", "delete", "review")
        count = rng.choice((acts, 1, 1, 2, 2, 3)) if faults is None else faults
        plan = plan_faults(rng, int(count), FAULTS_UNTIL, ARMED if acts else 0.5)
        self.database.reset(None)
        world = World(
            rng,
            plan,
            self.database,
            gateways=rng.choice((1, 1, 2)),
            generators=rng.choice((1, 2)),
            batches=kind == "batch",
            takedowns=kind in ("takedown", "batch"),
            sweeps={"delete": 15.0, "takedown": 30.0, "batch": 30.0}.get(kind),
            # A picture that is drawn again when it is deleted: slow writers meet the sweeper.
            lag=LAG if kind == "delete" and rng.random() < 0.6 else 0.0,
        )
        world.armed_by_results = kind in ("plain", "references", "batch")
        self._world = world
        self.database.reset(world.strike)
        scenario = Scenario(world, rng, *self._keys, kind)
        broken: list[str] = []
        try:
            self._play(world, scenario)
            broken = broken_promises(world, scenario)
        except Stuck as error:
            broken = [str(error)]
        finally:
            trace = list(world.trace)
            self.database.quiet()
            world.loop.close()
            self._world = None
            self._runs += 1
            if self._runs % RUNS_PER_COLLECTION == 0:
                gc.collect()
        return Run(seed, kind, plan, broken, trace, world.loop.steps)

    def _play(self, world: World, scenario: Scenario) -> None:
        loop = world.loop
        loop.call_soon(scenario.start, context=loop.nobody)
        loop.run(lambda: scenario.started and scenario.over, LONGEST)
        world.calm()
        loop.run(lambda: False, loop.time() + (SETTLE if scenario.leaves_garbage else 1.0))
        loop.run(world.settled, loop.time() + LONGEST)

    # -- in place of the real ones ---------------------------------------------------------------

    def _now(self) -> float:
        return self._world.loop.time() if self._world is not None else 0.0

    def _ahead(self) -> float:
        return self._world.ahead if self._world is not None else 0.0

    def _replacements(self) -> Iterator[tuple[Any, str, Any]]:
        yield sys, "unraisablehook", lambda unraisable: None
        yield time, "time", lambda: EPOCH + self._now() + self._ahead()
        yield time, "time_ns", lambda: int(1e9 * (EPOCH + self._now()))
        yield time, "monotonic", lambda: 1000.0 + self._now()
        yield time, "sleep", _no_sleep
        yield secrets, "token_hex", lambda size=32: self._rng.randbytes(size).hex()
        yield secrets, "token_bytes", lambda size=32: self._rng.randbytes(size)
        yield secrets, "randbelow", lambda limit: self._rng.randrange(limit)
        # Forecasts change nothing that is checked here, and are a tenth of all transactions.
        yield Estimator, "changed_forecast", lambda estimator, pause: None
        yield safe_http, "_exchange", self._exchange
        yield sender, "RETRY_DELAYS", RETRY_DELAYS
        yield from _everywhere(encode.encode_image, picture_file)
        yield from _everywhere(encode.given_images, given_pixels)
        yield from _everywhere(encode.blur, self._blur)
        yield from _everywhere(takedowns.fingerprint, _fingerprint)
        yield takedowns, "count_pixels", lambda *data: 16
        yield from _everywhere(_marking_keys(), lambda gateway: None)

    async def _exchange(self, *arguments: Any) -> Any:
        assert self._world is not None
        return await self._world.receiver.exchange(*arguments)

    def _blur(self, pixels: Any) -> Any:
        assert self._world is not None
        return blurred(self._world.ledger.blurs)(pixels)

    def _prepared(self) -> tuple[KeyRecord, KeyRecord]:
        """The keys of two teams and a webhook endpoint, which every run begins with."""
        database = Database(self.database.engine, SystemClock())
        artist = database.api_keys.create(team="artists", scopes=("images", "jobs"))[1]
        reviewer = database.api_keys.create(team="reviewers", scopes=("moderation",))[1]
        database.webhooks.add_endpoint(artist.team_id, "all", URL, list(TERMINAL_EVENTS))
        self.database.keep()
        return artist, reviewer


def _no_sleep(seconds: float) -> None:
    raise AssertionError(f"something sleeps for {seconds} s and blocks its thread")


def _everywhere(old: Any, new: Any) -> Iterator[tuple[Any, str, Any]]:
    """Every module of the service that knows ``old`` by whatever name."""
    for name, module in sorted(sys.modules.items()):
        if name.startswith("calotype."):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    yield module, attribute, new


def _marking_keys() -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(takedowns, "marking_keys", None) or takedowns._keys
    return found


def _fingerprint(data: bytes, keys: object, *, as_made: bool = False) -> Any:
    """In place of `fingerprint`: pictures are known by their digest, as by a watermark."""
    found = shown_in(data)
    if not found:
        raise ImageError("no picture")
    return takedowns.Fingerprint(None, found[0])
