"""What a generator needs of a dispatcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from calotype.serving.core.errors import CalotypeError
from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.jobs.records import Checkpoint, PreviewRecord
from calotype.serving.jobs.result import GenerationResult


class IntermediatesSink(Protocol):
    """Takes what a lease leaves while it is drawn."""

    async def checkpoint(self, checkpoint: Checkpoint) -> bool: ...

    async def preview(self, preview: PreviewRecord) -> bool: ...


class LeaseSource(IntermediatesSink, Protocol):
    """The generators' side of `dispatch.dispatcher.Dispatcher`, where it is described."""

    async def lease(self, replica: str, limit: int, wait_seconds: float) -> list[Lease]: ...

    async def heartbeat(
        self, replica: str, progress: Mapping[str, LeaseProgress]
    ) -> Sequence[str]: ...

    async def complete(self, job_id: str, fence: int, result: GenerationResult) -> bool: ...

    async def fail(self, job_id: str, fence: int, error: CalotypeError) -> bool: ...

    async def release(self, job_id: str, fence: int) -> bool: ...

    async def drop_checkpoint(self, job_id: str, fence: int) -> bool: ...
