"""Calls between simulated processes, in place of Ray Serve's handles.

The callers are production code (`deployments.remote`, `deployments.backend`): what they see of a
dead replica is what Ray raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError, RayTaskError
from simulation.loop import CURRENT, Process, SimulatedLoop, answer

from calotype.serving.core.errors import CalotypeError, error_from_payload
from calotype.serving.core.json_object import JsonObject
from calotype.serving.deployments.backend import RayBackend
from calotype.serving.deployments.replicas.dispatcher import DispatcherCalls
from calotype.serving.dispatch.dispatcher import Dispatcher
from calotype.serving.jobs.outage import part_at_fault
from calotype.serving.wire.model_status import ModelAppStatus

if TYPE_CHECKING:
    from simulation.world import World

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


class SimulatedBackend(RayBackend):
    """The production backend; its handles lead to simulated processes."""

    def __init__(self, world: World, database: Any, find: Callable[[str], Handle]) -> None:
        super().__init__(database, {"shapes": "model-shapes"})
        self._find = find

    def _handle(self, deployment: str, app: str) -> Any:
        return self._find(deployment)
