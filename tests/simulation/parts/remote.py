"""Calls between simulated processes, in place of Ray Serve's handles.

The callers are production code (`deployments.remote`, `replicas.ingress`): what they see of a dead
replica is what Ray raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError, RayTaskError
from simulation.loop import CURRENT, Process, SimulatedLoop, answer

from calotype.serving.cluster.remote_backend import model_status
from calotype.serving.core.decision import CheckScope, Decision
from calotype.serving.core.errors import CalotypeError, Overloaded, error_from_payload
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.protocols import ModelStatus
from calotype.serving.deployments.replicas.dispatcher import DispatcherCalls
from calotype.serving.deployments.replicas.ingress import ServedModelApp
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.jobs.outage import part_at_fault
from calotype.serving.wire.model_status import ModelAppStatus

if TYPE_CHECKING:
    from simulation.world import World

    from calotype.serving.core.request import Pixels

AWAY_SECONDS = 0.5
UNREACHABLE_SECONDS = 0.05
"""After which a caller is told that nobody is there."""


class Handle:
    """Of the current replica of a deployment: ``handle.method.remote(...)``."""

    def __init__(self, world: World, deployment: str) -> None:
        self._world, self._deployment = world, deployment

    def __getattr__(self, method: str) -> _Method:
        return _Method(self._world, self._deployment, method)


class _Method:
    def __init__(self, world: World, deployment: str, method: str) -> None:
        self._world, self._deployment, self._method = world, deployment, method

    def remote(self, *arguments: Any) -> Awaitable[Any]:
        return self._call(arguments)

    async def _call(self, arguments: Sequence[Any]) -> Any:
        world, caller = self._world, CURRENT.get()
        found = world.servers.get(self._deployment)
        fault = world.faults.cross("rpc", str(caller))
        if world.lag and self._method == "complete":
            await asyncio.sleep(world.lag * world.rng.random())
        if fault is not None:
            world.note(f"{fault.what}: {caller} calls {self._deployment}.{self._method}")
            if fault.what == "kill callee" and found is not None:
                world.kill(found[0], fault.seconds)
            elif fault.what == "kill caller" and caller is not None:
                world.kill(caller, fault.seconds)
                await asyncio.Event().wait()
            elif fault.what == "request lost":
                await asyncio.sleep(UNREACHABLE_SECONDS)
                raise RayActorError
        if found is None or not found[0].alive or world.away(self._deployment):
            await asyncio.sleep(UNREACHABLE_SECONDS)
            raise RayActorError
        lost = fault is not None and fault.what == "answer lost"
        return await self._ask(found[0], getattr(found[1], self._method)(*arguments), lost)

    async def _ask(self, process: Process, work: Any, lost: bool) -> Any:
        loop = self._world.loop
        future: asyncio.Future[Any] = loop.create_future()
        process.calls.add(future)
        task = loop.spawn(process, _serve(loop, process, future, work))
        try:
            found = await future
        except asyncio.CancelledError:
            task.cancel()  # Serve hands a cancellation on
            raise
        if lost:
            raise RayActorError
        return found


async def _serve(
    loop: SimulatedLoop, process: Process, future: asyncio.Future[Any], work: Any
) -> None:
    found, error = None, None
    try:
        found = await work
    except CalotypeError as problem:
        error = RayTaskError("call", "", error_from_payload(problem.to_payload()))
    except Exception as problem:
        error = RayTaskError("call", "", problem)
    process.calls.discard(future)
    loop.call_soon(answer, future, found, error, context=loop.nobody)


class DispatcherServer(DispatcherCalls):
    """The calls of `DispatcherDeployment`, noted."""

    def __init__(self, core: Dispatcher, world: World) -> None:
        super().__init__(core)
        self._world = world

    async def lease(self, replica: str, limit: int, wait_seconds: float) -> list[JsonObject]:
        found = await super().lease(replica, limit, wait_seconds)
        for lease in found:
            self._world.note(f"{replica} leases {lease['job_id']} under {lease['fence']}")
        return found

    async def complete(self, job_id: str, fence: int, result: JsonObject) -> bool:
        if self._world.armed_by_results:
            self._world.faults.arm("dispatcher")
        done = await super().complete(job_id, fence, result)
        self._world.note(f"complete({job_id}, {fence}) = {done}")
        if done:
            self._world.completed.append((job_id, fence))
        return done

    async def fail(self, job_id: str, fence: int, error: JsonObject) -> bool:
        done = await super().fail(job_id, fence, error)
        self._world.note(f"fail({job_id}, {fence}, {error.get('code')}) = {done}")
        if done and part_at_fault(error_from_payload(error)) is not None:
            self._world.given_back.append((job_id, fence))
        return done

    async def status(self) -> JsonObject:
        return ModelAppStatus(name="shapes", ready=True, replicas=1).payload()


class SimulatedBackend:
    """The model app behind a gateway's `RemoteBackend`, without the HTTP between the two."""

    def __init__(self, database: Any, find: Callable[[str], Any]) -> None:
        self._database = database
        self._app = ServedModelApp(find("Dispatcher"), find("Moderator"))

    async def submit(self, job_id: str) -> None:
        await self._known(job_id)
        await self._app.submit(job_id)

    async def wait(self, job_id: str, timeout: float) -> None:
        try:
            await self._known(job_id)
            await self._app.wait(job_id, timeout)
        except Overloaded:  # the caller asks the database after a pause
            await asyncio.sleep(min(AWAY_SECONDS, timeout))

    async def cancel(self, job_id: str) -> None:
        await self._known(job_id)
        await self._app.cancel(job_id)

    async def moderate(
        self,
        texts: Sequence[str],
        images: Sequence[Pixels],
        scope: CheckScope | None = None,
        models: Sequence[str] | None = None,
    ) -> list[Decision]:
        return await self._app.moderate(texts, images, scope)

    async def status(self) -> list[ModelStatus]:
        try:
            return [model_status("shapes", await self._app.status())]
        except CalotypeError as error:
            return [ModelStatus("shapes", ready=False, message=error.message, answers=False)]

    async def _known(self, job_id: str) -> None:
        if await asyncio.to_thread(self._database.jobs.get_job, job_id) is None:
            raise Overloaded("This job is not known at the moment.", retry_after=30)
