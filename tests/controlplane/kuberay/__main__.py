"""`python -m controlplane.kuberay KUBECONFIG`: KubeRay's place is taken by this controller.

It makes the objects that KubeRay 1.7 makes and the same calls on the head in the same order. It
does not do incremental upgrades, ingresses, mutual TLS, Redis, batch schedulers or groups of
several hosts.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import aiohttp
from controlplane.client.api_client import ApiClient, ApiError
from controlplane.client.objects import Object
from controlplane.kuberay.objects import GROUP, PASSING, PLURALS, Objects
from controlplane.kuberay.rayclusters import RayClusters
from controlplane.kuberay.rayjobs import RayJobs
from controlplane.kuberay.rayservices import RayServices

ROUND_SECONDS = 2.0
SELECTOR = "app.kubernetes.io/created-by=kuberay-operator"


class Controller:
    """Reconciles every object of the three kinds every 2 s and after each change."""

    def __init__(self, objects: Objects, session: aiohttp.ClientSession) -> None:
        self._objects = objects
        self._due = asyncio.Event()
        self._seen: dict[str, Any] = {}
        self._kinds = {
            "RayService": RayServices(objects, session),
            "RayJob": RayJobs(objects, session),
            "RayCluster": RayClusters(objects),
        }

    async def run(self, api: ApiClient) -> None:
        watches = [
            asyncio.create_task(api.watch(f"{GROUP}/{plural}", self._changed))
            for plural in PLURALS.values()
        ]
        watches.append(
            asyncio.create_task(api.watch("/api/v1/pods", self._changed, labelSelector=SELECTOR))
        )
        print("the controller is ready", flush=True)
        while True:
            try:
                async with asyncio.timeout(ROUND_SECONDS):
                    await self._due.wait()
            except TimeoutError:
                pass
            self._due.clear()
            for kind, controller in self._kinds.items():
                await self._round(kind, controller)

    def _changed(self, change: str, found: Object) -> None:
        """A changed status of our own kinds is no reason for another round; a pod's is."""
        meta = found["metadata"]
        state: tuple[Any, ...] = (change, meta.get("generation"), "deletionTimestamp" in meta)
        if found["kind"] in ("Pod", "RayCluster"):
            state = (*state, str(found.get("status", {}).get("conditions")))
        if self._seen.get(meta["uid"]) != state:
            self._seen[meta["uid"]] = state
            self._due.set()

    async def _round(self, kind: str, controller: Any) -> None:
        try:
            found = await self._objects.all(kind)
        except (ApiError, *PASSING) as error:
            print(f"{kind}: {type(error).__name__}: {error}", flush=True)
            return
        for one in found:
            try:
                await controller.reconcile(one)
            except (ApiError, *PASSING) as error:
                name = f"{one['metadata']['namespace']}/{one['metadata']['name']}"
                print(f"{kind} {name}: {type(error).__name__}: {error}", flush=True)


async def main(kubeconfig: Path) -> None:
    async with ApiClient(kubeconfig) as api, aiohttp.ClientSession() as session:
        await Controller(Objects(api), session).run(api)


asyncio.run(main(Path(sys.argv[1])))
