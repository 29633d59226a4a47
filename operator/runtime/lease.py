"""One operator acts at a time: a Lease of Kubernetes, held by the name of the pod.

The Deployment has one replica and no overlap; the Lease covers what that cannot: a node that is cut
off, and a pod on it that still acts. A container that is restarted in its pod has the name of the
holder and goes on at once.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import socket
import time
from collections.abc import Awaitable, Callable

from calotype.operator.api.conditions import moment
from calotype.operator.kube.client import ApiError, KubeClient
from calotype.operator.kube.objects import Manifest, Object
from calotype.operator.kube.resources import LEASES
from calotype.operator.settings import OperatorSettings

log = logging.getLogger(__name__)

DURATION_SECONDS = 15
RENEW_SECONDS = 4.0


class LeaseLost(Exception):
    """Another operator holds the Lease, or ours could not be renewed in time."""


class Lease:
    """The Lease of one release."""

    def __init__(
        self,
        kube: KubeClient,
        settings: OperatorSettings,
        holder: str | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._kube, self._settings, self._sleep = kube, settings, sleep
        self._name = f"{settings.release}-operator"
        self._holder = holder or socket.gethostname()
        self._renewed = 0.0

    async def acquire(self) -> None:
        """Returns when the Lease is ours."""
        while True:
            try:
                if await self._try():
                    self._renewed = time.monotonic()
                    return
            except ApiError as error:
                log.warning("the Lease cannot be had yet: %s", error)
            await self._sleep(RENEW_SECONDS / 2)

    async def keep(self) -> None:
        """Renews it for ever.

        Raises:
            LeaseLost: it is not ours any more; whoever runs must stop at once.
        """
        while True:
            await self._sleep(RENEW_SECONDS)
            try:
                if not await self._try():
                    raise LeaseLost("another operator holds the Lease")
                self._renewed = time.monotonic()
            except ApiError as error:
                log.warning("the Lease could not be renewed: %s", error)
                if time.monotonic() - self._renewed > DURATION_SECONDS * 4:
                    # Nobody can have taken it either while the API server is away, or it would
                    # have told us; but behind a broken network nothing is certain.
                    raise LeaseLost(f"it was not renewed for a minute: {error}") from error

    async def release(self) -> None:
        """Lets another operator begin at once."""
        live = await self._kube.get(LEASES, self._settings.operator_namespace, self._name)
        if live is not None and _holder(live) == self._holder:
            await self._write(live, "")

    async def _try(self) -> bool:
        live = await self._kube.get(LEASES, self._settings.operator_namespace, self._name)
        if live is None:
            return await self._kube.create(self._manifest(self._holder)) is not None
        spec = live.get("spec") or {}
        renewed = moment(spec.get("renewTime"))
        duration = datetime.timedelta(seconds=spec.get("leaseDurationSeconds") or DURATION_SECONDS)
        held = _holder(live) not in ("", self._holder)
        if held and renewed is not None and self._kube.now() < renewed + duration:
            return False
        return await self._write(live, self._holder)

    async def _write(self, live: Object, holder: str) -> bool:
        body = self._manifest(holder)
        body["metadata"] = {"resourceVersion": live["metadata"]["resourceVersion"]}
        try:
            changed = await self._kube.patch(
                LEASES, self._settings.operator_namespace, self._name, body
            )
        except ApiError as error:
            if error.status == 409:
                return False
            raise
        return changed is not None

    def _manifest(self, holder: str) -> Manifest:
        now = self._kube.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._settings.operator_namespace},
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": DURATION_SECONDS,
                "renewTime": now,
            },
        }


def _holder(live: Object) -> str:
    return str((live.get("spec") or {}).get("holderIdentity") or "")
