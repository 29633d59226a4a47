"""What a generator says of its leases while it draws nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.testing.in_memory import MemoryBlobStore, ScriptedSafety
from calotype.serving.worker.generation import GenerationWorker


class NoWork:
    """A dispatcher without jobs."""

    def __init__(self) -> None:
        self.polls, self.beats = 0, 0

    async def lease(self, replica: str, limit: int, wait_seconds: float) -> list[Lease]:
        self.polls += 1
        await asyncio.sleep(0.01)
        return []

    async def heartbeat(self, replica: str, progress: Mapping[str, LeaseProgress]) -> Sequence[str]:
        self.beats += 1
        return ()


async def test_a_generator_without_leases_sends_no_heartbeats() -> None:
    leases = NoWork()
    engine: Any = SimpleNamespace(alive=True)
    worker = GenerationWorker(
        *("idle", engine, cast(Any, leases), cast(Any, None), ScriptedSafety(), MemoryBlobStore()),
        beat_seconds=0.001,
        wait_seconds=0.01,
    )
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(60):
        while leases.polls < 10:
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert leases.beats == 0
