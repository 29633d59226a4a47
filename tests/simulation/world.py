"""One run of the whole service: its processes, its stores, and what happens to them.

Gateways, dispatcher and generators are production code over the real job database (in memory). They
are killed, paused, cut off from each other and from their stores as the plan of faults says, and
started again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Coroutine, Sequence
from typing import Any

from ray.exceptions import RayActorError
from simulation.faults import Fault, Faults
from simulation.loop import CURRENT, Killed, Process, SimulatedLoop
from simulation.parts.blobs import SimulatedBlobs
from simulation.parts.database import SimulatedDatabase, failed
from simulation.parts.pictures import shown_in
from simulation.parts.receiver import Receiver
from simulation.parts.remote import DispatcherServer, Handle, SimulatedBackend
from simulation.parts.services import Ledger, ModeratorServer, SimulatedEngine, TextEncoderServer

from calotype.serving.api.app import make_gateway
from calotype.serving.api.background.tasks import background_tasks
from calotype.serving.api.generation.files import keep_file
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.gateway import Gateway
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.config import BUILT_IN_MODEL
from calotype.serving.core.protocols import SystemClock
from calotype.serving.database.database import Database
from calotype.serving.deployments.remote import RemoteLeases, RemotePrompts, RemoteSafety
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.moderation_checks import CheckRetries
from calotype.serving.worker.generation import GenerationWorker

_CHECKS = CheckRetries(delays=(0.5, 2.0, 5.0), timeout=10.0)
_POLICY = DispatchPolicy(
    lease_seconds=12.0,
    max_outage_seconds=240.0,
    sweep_seconds=4.0,
    rescan_seconds=30.0,
    poll_seconds=30.0,
    check_retries=_CHECKS,
)
BEAT_SECONDS = 4.0
STEP_SECONDS = 1.5
REQUEST_SECONDS = 120.0
"""After which a synchronous request gives its job up."""
_CATALOG = Catalog([BUILT_IN_MODEL])


class World:
    """Args:
    gateways, generators: how many of each there are.
    batches: gateways work on batches.
    takedowns: the moderator knows what was taken down.
    sweeps: seconds between sweeps, where something is deleted; None = they come seldom or never.
    lag: seconds at most between a generator's last file and the moment its result is heard; a
        sixth of it for each of its blocking calls.
    """

    def __init__(
        self,
        rng: random.Random,
        plan: Sequence[Fault],
        database: SimulatedDatabase,
        *,
        gateways: int,
        generators: int,
        batches: bool,
        takedowns: bool,
        sweeps: float | None,
        lag: float,
    ) -> None:
        self.rng = rng
        self.faults = Faults(plan)
        self.lag = lag
        self.loop = SimulatedLoop(rng, self._slow_call)
        self.database = database
        self.engine = database.engine
        self.clock = SystemClock()
        self.blobs = SimulatedBlobs(self)
        self.receiver = Receiver(self)
        self.ledger = Ledger()
        self.servers: dict[str, tuple[Process, Any]] = {}
        """By deployment."""
        self.gateways: dict[str, tuple[Process, Gateway]] = {}
        """By name."""
        self.given_back: list[tuple[str, int]] = []
        """Job and fence of each lease that its generator gave back for a passing fault."""
        self.completed: list[tuple[str, int]] = []
        """Job and fence of each result that the dispatcher took."""
        self.trace: list[str] = []
        self.ahead = 0.0
        """Seconds by which clocks were set forward."""
        self._away: dict[str, float] = {}
        self.armed_by_results = True
        """Faults are armed by the first result; otherwise the scenario arms them."""
        self._after_commit: Fault | None = None
        self._takedowns = takedowns
        self._settings = GatewaySettings(
            public_url="https://pictures.test",
            request_timeout=REQUEST_SECONDS,
            job_deadline=500.0,
            hangup_grace=6.0,
            wait_slice=20.0,
            asset_seconds=50_000.0,
            url_seconds=100_000,
            forecast_seconds=5.0,
            watch_seconds=3.0,
            sweep_seconds=sweeps or (300.0 if rng.random() < 0.2 else None),
            garbage_seconds=5.0,
            webhook_seconds=60.0,
            audit_seconds=None,
            batch_seconds=8.0 if batches else None,
        )
        for place in range(gateways):
            self._start_gateway(f"gateway-{place}")
        self._start_dispatcher()
        self._start_encoder()
        self._start_moderator()
        for place in range(generators):
            self._start_generator(f"generator-{place}")
        for fault in self.faults.moments:
            self.loop.call_at(fault.at, self._strike_moment, fault, context=self.loop.nobody)

    # -- what happens --------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Adds to the trace of this run."""
        self.trace.append(f"{self.loop.time():8.2f} {text}")

    def away(self, part: str) -> bool:
        """Whether nothing reaches a part of the service at the moment."""
        return self._away.get(part, 0.0) > self.loop.time()

    def kill(self, process: Process, seconds: float) -> None:
        """Kills a process, and starts it again after ``seconds``."""
        if not process.alive:
            return
        self.note(f"{process} is killed, back in {seconds:.1f} s")
        self.loop.kill(process, RayActorError)
        starts = {
            "gateway": self._start_gateway,
            "generator": self._start_generator,
            "dispatcher": lambda name: self._start_dispatcher(),
            "encoder": lambda name: self._start_encoder(),
            "moderator": lambda name: self._start_moderator(),
        }
        start = starts[process.name.partition("-")[0]]
        self.loop.call_later(seconds, start, process.name, context=self.loop.nobody)

    def strike(self, stage: str, raw: Any) -> None:
        """What goes wrong at a transaction: see `database.Strike`."""
        process = CURRENT.get()
        if process is None:
            return
        if not process.alive:
            raise Killed
        if stage == "begin":
            if self.away("database"):
                raise failed()
            fault = self.faults.cross("begin", process.name)
        elif stage == "before commit":
            fault = self.faults.cross("commit", process.name)
            if fault is not None and fault.what.endswith("after"):
                self._after_commit, fault = fault, None
        else:
            self._after_commit, fault = None, self._after_commit
        if fault is None:
            return
        self.note(f"{fault.what} of {stage} in {process}")
        if fault.what.startswith("kill"):
            self.kill(process, fault.seconds)
            raise Killed
        raise failed()

    def calm(self) -> None:
        """Nothing goes wrong any more."""
        self.faults.stop()
        self._away.clear()

    def store_file(self, data: bytes, team_id: str) -> str:
        """Uploads the input of a batch before anything goes wrong; its id."""
        gateway = next(iter(self.gateways.values()))[1]
        file = keep_file(
            *(gateway, team_id, data, "jsonl"),
            purpose="batch",
            filename="lines.jsonl",
            content_type="application/jsonl",
            expires=None,
        )
        return file.id

    def digests_of(self, blob_key: str) -> set[str]:
        """The pictures in a stored file."""
        return set(shown_in(self.blobs.blobs.get(blob_key, b"")))

    def settled(self) -> bool:
        """Whether all jobs are over, and everybody was told of it."""
        open_jobs = "SELECT 1 FROM jobs WHERE status IN ('queued', 'running') LIMIT 1"
        waiting = "SELECT 1 FROM webhook_deliveries WHERE status = 'pending' LIMIT 1"
        return not self.database.rows(open_jobs) and not self.database.rows(waiting)

    def _slow_call(self) -> float:
        process = CURRENT.get()
        name = "" if process is None else process.name
        fault = self.faults.cross("thread", name)
        if fault is None:
            return self.lag / 6 * self.rng.random() if name.startswith("generator") else 0.0
        self.note(f"a call of {name} waits {fault.seconds:.1f} s")
        return fault.seconds

    def _strike_moment(self, fault: Fault) -> None:
        if fault not in self.faults.plan:
            return
        self.note(str(fault))
        kind, _, rest = fault.what.partition(" ")
        if kind in ("kill", "pause"):
            names = [p for p in self._processes() if p.name.startswith(rest) and p.alive]
            if not names:
                return
            process = self.rng.choice(names)
            if kind == "kill":
                self.kill(process, fault.seconds)
            else:
                process.paused_until = self.loop.time() + fault.seconds
        elif kind == "clock":
            self.ahead += fault.seconds
        else:
            parts = {"encoder": "TextEncoder", "moderator": "Moderator"}
            self._away[parts.get(kind, kind)] = self.loop.time() + fault.seconds

    def _processes(self) -> list[Process]:
        found = [process for process, _ in (*self.servers.values(), *self.gateways.values())]
        return sorted(found, key=lambda process: process.name)

    # -- processes -----------------------------------------------------------------------------

    def handle(self, deployment: str) -> Handle:
        return Handle(self, deployment)

    def _start_gateway(self, name: str) -> None:
        process, database = Process(name), Database(self.engine, self.clock)
        settings = self._settings
        backend = SimulatedBackend(database, self.handle)
        gateway = make_gateway(
            *(settings, database, self.blobs, backend, _CATALOG),
            url_secret=b"simulated",
            outlives_models=True,
        )
        gateway = dataclasses.replace(gateway, outbound=self.receiver.policy)
        self.gateways[name] = (process, gateway)
        self._run(process, _beside(gateway))

    def _start_dispatcher(self) -> None:
        process, database = Process("dispatcher"), Database(self.engine, self.clock)
        safety = RemoteSafety(self._as_serve("Moderator"))
        core = Dispatcher(database, safety, self.clock, _POLICY, model=BUILT_IN_MODEL.name)

        async def start() -> None:
            await core.start()
            self.servers["Dispatcher"] = (process, DispatcherServer(core, self))

        self._run(process, start())

    def _start_encoder(self) -> None:
        self.servers["TextEncoder"] = (Process("encoder"), TextEncoderServer())

    def _start_moderator(self) -> None:
        listed = Database(self.engine, self.clock).takedowns

        def taken_down() -> frozenset[str]:
            if not self._takedowns:
                return frozenset()
            return frozenset(str(record.payload) for record in listed.list_takedowns())

        self.servers["Moderator"] = (
            Process("moderator"),
            ModeratorServer(self.ledger, taken_down),
        )

    def _start_generator(self, name: str) -> None:
        process = Process(name)
        self.servers[name] = (process, None)
        worker = GenerationWorker(
            f"{name}/{next(self.loop.numbers)}",
            SimulatedEngine(self.ledger, STEP_SECONDS),  # type: ignore[arg-type]
            RemoteLeases(self._as_serve("Dispatcher")),
            RemotePrompts(self._as_serve("TextEncoder")),
            RemoteSafety(self._as_serve("Moderator")),
            self.blobs,
            concurrency=2,
            beat_seconds=BEAT_SECONDS,
            wait_seconds=10.0,  # less than a lease lasts: a dead replica gets no second job
            check_retries=_CHECKS,
        )
        self._run(process, worker.run())

    def _as_serve(self, deployment: str) -> Any:
        return self.handle(deployment)

    def _run(self, process: Process, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await work
            except Exception as error:
                self.note(f"{process} ends: {error!r}")
                self.kill(process, 2.0)

        self.loop.spawn(process, run())


async def _beside(gateway: Gateway) -> None:
    async with background_tasks(gateway):
        await asyncio.Event().wait()
