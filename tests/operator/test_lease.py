"""One operator acts at a time."""

from __future__ import annotations

import asyncio

from calotype.operator.kube.resources import LEASES
from calotype.operator.runtime.lease import DURATION_SECONDS, Lease
from calotype.operator.testing.client import DirectKubeClient

from .virtual import World


class Pods:
    """Operators that want the Lease, on the world's clock."""

    def __init__(self, world: World) -> None:
        self._world, self._kube = world, DirectKubeClient(world.server)
        self.naps = 0

    def lease(self, pod: str) -> Lease:
        return Lease(self._kube, self._world.settings(), pod, self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.naps += 1
        self._world.clock.seconds += seconds
        await asyncio.sleep(0)

    @property
    def holder(self) -> str:
        lease = self._world.get(LEASES, "calotype-operator")
        return str(lease["spec"]["holderIdentity"])


async def test_another_operator_waits_until_the_lease_is_given_back(world: World) -> None:
    pods = Pods(world)
    first = pods.lease("pod-1")
    await first.acquire()
    waiting = asyncio.create_task(pods.lease("pod-2").acquire())
    while pods.naps < 2:
        await asyncio.sleep(0)
    assert not waiting.done()
    await pods.lease("pod-1").acquire()  # the same pod, started again
    assert pods.holder == "pod-1"
    await first.release()
    await waiting
    assert pods.holder == "pod-2"


async def test_a_lease_that_is_not_renewed_is_taken_over(world: World) -> None:
    pods = Pods(world)
    await pods.lease("pod-1").acquire()
    began = world.clock.seconds
    await pods.lease("pod-2").acquire()
    assert pods.holder == "pod-2"
    assert world.clock.seconds - began >= DURATION_SECONDS
