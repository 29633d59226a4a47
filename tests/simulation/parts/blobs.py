"""The blob store in memory, with faults before and after each effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulation.faults import Fault
from simulation.loop import CURRENT, Killed

from calotype.serving.core.errors import StorageFailed
from calotype.serving.testing.in_memory import MemoryBlobStore

if TYPE_CHECKING:
    from simulation.world import World


class SimulatedBlobs(MemoryBlobStore):
    """As every process of the world sees it."""

    def __init__(self, world: World) -> None:
        super().__init__(world.clock)
        self._world = world

    def put(self, key: str, data: bytes) -> None:
        fault = self._before(key)
        super().put(key, data)
        self._world.note(f"{CURRENT.get()} puts {key}")
        self._after(fault)

    def get(self, key: str) -> bytes:
        fault = self._before(key)
        data = super().get(key)
        self._after(fault)
        return data

    def delete(self, key: str) -> None:
        fault = self._before(key)
        super().delete(key)
        self._world.note(f"{CURRENT.get()} deletes {key}")
        self._after(fault)

    def _before(self, key: str) -> Fault | None:
        process = CURRENT.get()
        if process is None:
            return None
        if self._world.away("blobs"):
            raise StorageFailed("The object store does not answer.", retry_after=2)
        fault = self._world.faults.cross("blob", process.name)
        if fault is not None:
            self._world.note(f"{fault.what} at {key} in {CURRENT.get()}")
            if fault.what.endswith("before"):
                self._strike(fault)
                return None
        return fault

    def _after(self, fault: Fault | None) -> None:
        if fault is not None:
            self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        process = CURRENT.get()
        if fault.what.startswith("kill") and process is not None:
            self._world.kill(process, fault.seconds)
            raise Killed
        raise StorageFailed("The object store failed.", retry_after=2)
