"""Keeps the process that holds Ray running, and tells how long it will be away.

Whoever supervises must not hold Ray's driver: when Ray's head dies, the driver's process is ended
by Ray's own C++. So the driver lives in a child, and a child that ended is followed by another one,
after a pause that grows. Until a child has served once, a few attempts are all: what cannot start
shall say so and end.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from calotype.serving.cluster.child_process import Child, ChildProcess
from calotype.serving.cluster.stand_in import StandIn
from calotype.serving.core.errors import CalotypeError, ModelLoadFailed, Overloaded
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.tls import TlsFiles
from calotype.serving.wire.ray_host import HostOrder, HostReport

HOST_MODULE = "calotype.serving.deployments.ray_host.process"
START_SECONDS = 240.0
"""Default of what Ray's own start may take; on a machine that is busy it is over a minute."""
LAUNCHING = "Starting Ray"
EXPECTED_SECONDS = 60.0
"""What a start is told to take before one was measured."""
STOOD_STILL_SECONDS, CATCH_UP_SECONDS = 1.0, 10.0
"""A limit that is noticed so late says that this process did not run; how long it then listens."""
HOPELESS = 5
"""After so many failures in a row the kubelet shall try a new pod."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    start_seconds: float = START_SECONDS
    """What Ray's own start may take; then it is ended and tried again."""
    silent_seconds: float = 120.0
    """Once Ray runs: saying nothing for so long, it hangs, and is ended and tried again."""
    first_tries: int = 3
    """Attempts until it has served once."""
    pauses: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
    """Before the next start: by failures in a row; the last one stays."""
    stable_seconds: float = 120.0
    """Serving for so long makes failures before it forgotten."""
    progress_seconds: float = 10.0
    """How often somebody who waits is told what is going on."""

    def pause(self, failures: int) -> float:
        return self.pauses[min(failures, len(self.pauses)) - 1]


class Supervisor:
    """Runs children one after the other.

    Args:
        launch: starts a child.
        token: what callers of the child's HTTP side must show.
        say: where sentences for whoever reads the log go.
        clock: seconds that never go back.
        sleep: how pauses are made.
    """

    def __init__(
        self,
        launch: Callable[[], Awaitable[Child]],
        token: str,
        say: Callable[[str], None],
        policy: RestartPolicy = RestartPolicy(),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._launch, self._token, self._say = launch, token, say
        self._policy, self._clock, self._sleep = policy, clock, sleep
        self._child: Child | None = None
        self._order = HostOrder(number=0, applications=[], token=token)
        self._good = self._order
        """The last one that ran: a child that follows another begins with nothing worse."""
        self._answered = asyncio.Condition()
        self._applied, self._refusal = 0, ""
        self._ending = asyncio.Event()
        self._stage, self._stage_since = LAUNCHING, clock()
        self._failures = 0
        self._served = False  # whether any child ever has
        self._serving_since: float | None = None
        self._gone_since = clock()
        self._expected_at = clock() + EXPECTED_SECONDS
        self._usual_seconds = EXPECTED_SECONDS
        self.on_change: Callable[[bool], Awaitable[None]] = _nothing
        """Called when a child begins or ceases to serve, and at the beginning."""

    # -- what others ask -------------------------------------------------------------------------

    @property
    def serving(self) -> bool:
        return self._serving_since is not None

    @property
    def ending(self) -> bool:
        """Whether it was told to end."""
        return self._ending.is_set()

    @property
    def hopeful(self) -> bool:
        """It has served, and what ended it may pass."""
        return self.serving or (self._served and self._failures < HOPELESS)

    def away_seconds(self) -> float:
        """When it will serve again, by how long it took before; at least 1."""
        return max(1.0, self._expected_at - self._clock())

    def problem(self) -> CalotypeError:
        """What callers are told while it does not serve."""
        seconds = round(self.away_seconds())
        return Overloaded(
            f"The model is being {'re' if self._served else ''}started and is expected in about "
            f"{seconds} s. Jobs are accepted and wait for it.",
            retry_after=float(seconds),
            details={"estimated_seconds": float(seconds)},
        )

    async def apply(self, applications: Sequence[JsonObject]) -> None:
        """Has exactly these applications run, also after restarts; returns when they do.

        Raises:
            ModelLoadFailed: they cannot; those before run on.
        """
        order = self.want(applications)
        async with self._answered:
            await self._answered.wait_for(lambda: self._applied >= order.number)
            if self._refusal and self._applied == order.number:
                raise ModelLoadFailed(self._refusal)

    def want(self, applications: Sequence[JsonObject]) -> HostOrder:
        """As `apply`, and returns at once."""
        number = self._order.number + 1
        self._order = HostOrder(number=number, applications=list(applications), token=self._token)
        if self._child is not None:
            self._child.order(self._order)
        return self._order

    # -- its life --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until `end`.

        Raises:
            ModelLoadFailed: it cannot be started; says why.
        """
        telling = asyncio.create_task(self._tell_progress())
        try:
            await self.on_change(False)
            while not self._ending.is_set():
                reason, final = await self._live()
                if self._ending.is_set():
                    return
                self._failures += 1
                last = final or self._failures >= self._policy.first_tries
                if last and not self._served:
                    raise ModelLoadFailed(reason)
                pause = self._policy.pause(self._failures)
                self._expected_at = self._clock() + pause + self._usual_seconds
                self._begin("Waiting to start Ray again")
                self._say(f"{reason} It is started again in {pause:.0f} s; jobs are kept.")
                await self._pause(pause)
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    def end(self) -> None:
        """Has the child finish what it has begun; `run` returns when it is gone."""
        self._ending.set()
        if self._child is not None:
            self._child.end()

    async def kill(self) -> None:
        """Ends the child, now."""
        self._ending.set()
        if self._child is not None:
            await self._child.kill()

    async def _live(self) -> tuple[str, bool]:
        """One child's life.

        Returns:
            Why it ended, in a sentence, and whether another one would end the same way.
        """
        launched = self._clock()
        self._expected_at = launched + self._usual_seconds
        self._begin(LAUNCHING)
        child = self._child = await self._launch()
        child.order(self._order)
        if self._ending.is_set():
            child.end()
        reason, final, started = "", False, False
        reports, clock = child.reports(), asyncio.get_running_loop().time
        end = clock() + self._policy.start_seconds
        try:
            while (report := await _next(reports, end)) is not None:
                started = started or report.kind == "started"
                if started:
                    end = clock() + self._policy.silent_seconds
                if report.kind == "serving":
                    self._usual_seconds = max(1.0, self._clock() - launched)
                    await self._set_serving(True)
                elif report.kind == "failed":
                    reason, final = report.text, report.final
                    await self._set_serving(False)
                else:
                    await self._hear(report)
        except TimeoutError:
            reason = reason or self._overdue(started)
        finally:
            self._child = None
            await self._set_serving(False)  # before the rest of it is gone: callers wait
            await child.kill()
            status = await child.wait()
        return reason or _ended(status), final

    def _overdue(self, started: bool) -> str:
        if started:
            silent = self._policy.silent_seconds
            return f"The process that holds Ray hangs: it has said nothing for {silent:g} s."
        return (
            f"Ray did not start within {self._policy.start_seconds:g} s; "
            "--ray-start-seconds allows it more."
        )

    async def _hear(self, report: HostReport) -> None:
        if report.kind == "stage":
            self._begin(report.text)
        elif report.kind == "said":
            self._say(report.text)
        elif report.kind in ("applied", "refused"):
            await self._note(report)

    async def _note(self, report: HostReport) -> None:
        """An order was carried out or refused."""
        if report.number == self._order.number:
            if report.kind == "applied":
                self._good = self._order
            else:
                kept = {"applications": self._good.applications}
                self._order = self._order.model_copy(update=kept)
        async with self._answered:
            self._applied = report.number
            self._refusal = report.text if report.kind == "refused" else ""
            self._answered.notify_all()

    async def _set_serving(self, serving: bool) -> None:
        if serving == self.serving:
            return
        now = self._clock()
        if serving:
            if self._served:
                self._say(f"It is back after {now - self._gone_since:.0f} s.")
            self._served, self._serving_since = True, now
            self._begin("")
        else:
            assert self._serving_since is not None
            if now - self._serving_since >= self._policy.stable_seconds:
                self._failures = 0
            self._serving_since, self._gone_since = None, now
        await self.on_change(serving)

    async def _pause(self, seconds: float) -> None:
        """Cut short by `end`."""
        waits = [asyncio.ensure_future(w) for w in (self._sleep(seconds), self._ending.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in waits:
                waiting.cancel()

    def _begin(self, stage: str) -> None:
        if stage != self._stage:
            self._stage, self._stage_since = stage, self._clock()

    async def _tell_progress(self) -> None:
        while True:
            await self._sleep(self._policy.progress_seconds)
            if self._stage:
                seconds = self._clock() - self._stage_since
                self._say(f"{self._stage}: {seconds:.0f} s so far{self._try()}.")

    def _try(self) -> str:
        """Which attempt of the first ones it is, where it is not the first."""
        if self._served or not self._failures:
            return ""
        return f", attempt {self._failures + 1} of {self._policy.first_tries}"


async def _next(reports: AsyncIterator[HostReport], end: float) -> HostReport | None:
    """What a child says next; None when it is gone.

    Args:
        end: by the loop's clock.

    Raises:
        TimeoutError: it says nothing until then. Where it was this process that stood still, what
            came meanwhile is read first.
    """
    clock = asyncio.get_running_loop().time
    waiting = asyncio.ensure_future(anext(reports, None))
    try:
        while True:
            done, _ = await asyncio.wait({waiting}, timeout=max(0.0, end - clock()))
            if done:
                return waiting.result()
            if clock() - end < STOOD_STILL_SECONDS:
                raise TimeoutError
            end = clock() + CATCH_UP_SECONDS
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


def _ended(status: int) -> str:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"The process that holds Ray {how}."


async def _nothing(serving: bool) -> None:
    """Nobody wants to know."""


def supervise_host(
    listener: socket.socket,
    token: str,
    environment: Mapping[str, str],
    say: Callable[[str], None],
    start_seconds: float,
    *,
    log_to_driver: bool,
    tls: TlsFiles | None = None,
) -> Supervisor:
    """A supervisor of the process that holds Ray, and what answers on its socket without it.

    Args:
        listener: listens already; model apps answer on it while they are there.
        environment: of the process, and of all that Ray starts.
        start_seconds: what Ray's own start may take.
        log_to_driver: whether what replicas write appears here.
        tls: both speak HTTPS with them; None = plain HTTP.
    """
    command = [sys.executable, "-m", HOST_MODULE, "--start-seconds", f"{start_seconds:g}"]
    if log_to_driver:
        command.append("--log-to-driver")
    if tls is not None:
        command += ["--tls-certificate", str(tls.certificate), "--tls-key", str(tls.key)]

    async def launch() -> Child:
        return await ChildProcess.start(command, listener, environment)

    policy = RestartPolicy(start_seconds=start_seconds)
    supervisor = Supervisor(launch, token, say, policy)
    stand_in = StandIn(listener, supervisor.problem, lambda: supervisor.hopeful, tls)

    async def take_turns(serving: bool) -> None:
        if serving:
            stand_in.close()
        else:
            await stand_in.open()

    supervisor.on_change = take_turns
    return supervisor
