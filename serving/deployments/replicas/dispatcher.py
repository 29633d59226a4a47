"""The dispatcher as a Ray Serve deployment: one replica per model, rebuilt from the database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from calotype.serving.core.errors import EngineError, error_from_payload
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.protocols import SystemClock
from calotype.serving.deployments.job_store import open_job_store
from calotype.serving.deployments.remote import RemoteSafety
from calotype.serving.deployments.reporting import ReplicaReport
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.jobs.records import Checkpoint, PreviewRecord
from calotype.serving.jobs.result import GenerationResult
from calotype.serving.observability.logs import set_up_logs
from calotype.serving.wire.application import DispatcherConfig
from calotype.serving.wire.model_status import AdapterState, ModelAppStatus, ReplicaState

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

LEASE_SECONDS = 12.0
"""Generators beat every 2 s; a killed one costs its jobs this long."""
FORGET_SECONDS = 15.0
"""A replica that has not reported for so long does not count any more."""
DRAIN_POLL_SECONDS = 0.2


class DispatcherCalls:
    """Every method is that of `Dispatcher`, with payloads instead of objects."""

    def __init__(self, core: Dispatcher) -> None:
        self._core = core
        self._leasing: set[asyncio.Task[list[Lease]]] = set()
        self._draining = False

    async def submit(self, job_id: str) -> None:
        await self._core.submit(job_id)

    async def wait(self, job_id: str, wait_seconds: float) -> None:
        await self._core.wait(job_id, wait_seconds)

    async def cancel(self, job_id: str) -> bool:
        return await self._core.cancel(job_id)

    async def lease(self, replica: str, limit: int, wait_seconds: float) -> list[JsonObject]:
        if self._draining:
            await asyncio.sleep(wait_seconds)
            return []
        leasing = asyncio.create_task(self._core.lease(replica, limit, wait_seconds))
        self._leasing.add(leasing)
        try:
            await asyncio.wait({leasing})
        except asyncio.CancelledError:
            leasing.cancel()
            raise
        finally:
            self._leasing.discard(leasing)
        return [] if leasing.cancelled() else [lease.to_payload() for lease in leasing.result()]

    async def drain(self, patience: float) -> int:
        """Grants no lease any more, and returns when none is left or after ``patience`` seconds.

        Queued jobs stay in the database for the next dispatcher.

        Returns:
            How many leases are left.
        """
        self._draining = True
        for leasing in self._leasing:
            leasing.cancel()
        give_up = time.monotonic() + patience
        while (running := self._core.snapshot().running) and time.monotonic() < give_up:
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        return running

    async def heartbeat(self, replica: str, progress: Mapping[str, JsonObject]) -> list[str]:
        reached = {job_id: LeaseProgress.from_payload(at) for job_id, at in progress.items()}
        return await self._core.heartbeat(replica, reached)

    async def complete(self, job_id: str, fence: int, result: JsonObject) -> bool:
        return await self._core.complete(job_id, fence, GenerationResult.from_payload(result))

    async def fail(self, job_id: str, fence: int, error: JsonObject) -> bool:
        return await self._core.fail(job_id, fence, error_from_payload(error))

    async def release(self, job_id: str, fence: int) -> bool:
        return await self._core.release(job_id, fence)

    async def checkpoint(self, checkpoint: JsonObject) -> bool:
        return await self._core.checkpoint(Checkpoint.from_payload(checkpoint))

    async def drop_checkpoint(self, job_id: str, fence: int) -> bool:
        return await self._core.drop_checkpoint(job_id, fence)

    async def preview(self, preview: JsonObject) -> bool:
        return await self._core.preview(PreviewRecord.from_payload(preview))


class DispatcherDeployment(DispatcherCalls):
    """The dispatcher of one model, and what its generators and text encoders say of themselves."""

    async def __init__(  # type: ignore[misc]
        self, database_url: str, model: str, moderator: DeploymentHandle
    ) -> None:
        set_up_logs()
        self._model = model
        self._reports: dict[str, tuple[float, ReplicaReport]] = {}
        super().__init__(
            Dispatcher(
                await asyncio.to_thread(open_job_store, database_url),
                RemoteSafety(moderator),
                SystemClock(),
                DispatchPolicy(lease_seconds=LEASE_SECONDS),
                model=model,
            )
        )
        await self._core.start()

    async def report(self, state: ReplicaReport) -> float:
        """Takes a generator's or text encoder's state; answers with the backlog in seconds."""
        self._reports[state.replica] = (time.monotonic(), state)
        return self._core.backlog_seconds()

    async def status(self) -> JsonObject:
        """`wire.model_status.ModelAppStatus` as JSON."""
        now = time.monotonic()
        self._reports = {
            name: report
            for name, report in self._reports.items()
            if now - report[0] < FORGET_SECONDS
        }
        states = [state for _, state in self._reports.values()]
        generators = [s for s in states if s.kind == "generator"]
        encoders = [s for s in states if s.kind == "text_encoder"]
        adapters: dict[str, str] = {}
        for state in generators:
            for name, text in state.adapters.items():
                # One replica that cannot load an adapter makes it unusable: its word counts.
                if adapters.get(name, "ready") == "ready":
                    adapters[name] = text
        hashes = {state.config_hash for state in generators}
        return ModelAppStatus(
            name=self._model,
            ready=any(s.ready for s in generators) and any(s.ready for s in encoders),
            replicas=sum(1 for s in generators if s.ready),
            queue_seconds=self._core.backlog_seconds(),
            adapters=adapters,
            message=next((s.message for s in states if s.message), ""),
            config_hash=hashes.pop() if len(hashes) == 1 else "",
            replica_states=tuple(_replica_state(s) for s in generators),
        ).payload()

    def check_health(self) -> None:
        if "stuck" in self._core.loops.states().values():
            raise EngineError("The dispatcher does not look after its jobs any more.")

    def reconfigure(self, config: JsonObject) -> None:
        """Takes a `DispatcherConfig`; a dispatcher is of one model for its whole life."""
        wanted = DispatcherConfig.model_validate(config)
        if wanted.model != self._model:
            raise EngineError(
                f"This dispatcher is of the model {self._model!r}, not of {wanted.model!r}."
            )
        self._core.outages.longest = wanted.max_outage_seconds


def _replica_state(report: ReplicaReport) -> ReplicaState:
    """What one generator said of itself."""
    return ReplicaState(
        replica=report.replica,
        node=report.node,
        ready=report.ready,
        message=report.message,
        config_hash=report.config_hash,
        engine=report.engine,
        adapters={
            name: AdapterState.model_validate(load) for name, load in report.load_states.items()
        },
    )
