"""Storage: every claim of the default StorageClass gets a folder on this node."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import aiohttp
from controlplane.client.api_client import ApiClient, ApiError, allow
from controlplane.client.objects import Object

STORAGE_CLASS, PROVISIONER = "folders", "calotype.test/folders"
VOLUMES = "/api/v1/persistentvolumes"


class Claims:
    """Provisions claims below a folder, and removes what they leave."""

    def __init__(self, api: ApiClient, folder: Path) -> None:
        self._api, self._folder = api, folder
        self._tasks: set[asyncio.Task[None]] = set()

    async def install(self) -> None:
        """Makes the StorageClass, as the cluster's default."""
        document: Object = {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {
                "name": STORAGE_CLASS,
                "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
            },
            "provisioner": PROVISIONER,
            "reclaimPolicy": "Delete",
            "volumeBindingMode": "Immediate",
        }
        await allow(self._api.call("POST", "/apis/storage.k8s.io/v1/storageclasses", document), 409)

    def handle_claim(self, change: str, claim: Object) -> None:
        """Takes a change of a watch."""
        spec = claim["spec"]
        if change != "DELETED" and not spec.get("volumeName"):
            if spec.get("storageClassName") == STORAGE_CLASS:
                self._start(self._provision(claim))

    def handle_volume(self, change: str, volume: Object) -> None:
        """Takes a change of a watch: a volume whose claim is gone goes with its folder."""
        ours = volume["spec"].get("storageClassName") == STORAGE_CLASS
        released = volume.get("status", {}).get("phase") in ("Released", "Failed")
        policy = volume["spec"].get("persistentVolumeReclaimPolicy")
        if change != "DELETED" and ours and released and policy == "Delete":
            self._start(self._remove(volume))

    async def _provision(self, claim: Object) -> None:
        meta, spec = claim["metadata"], claim["spec"]
        # The next claim of that name is another one.
        path = self._folder / meta["namespace"] / f"{meta['name']}-{meta['uid']}"
        path.mkdir(parents=True, exist_ok=True)
        reference = {name: meta[name] for name in ("namespace", "name", "uid")}
        reference |= {"apiVersion": "v1", "kind": "PersistentVolumeClaim"}
        document: Object = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"folder-{meta['uid']}"},
            "spec": {
                "capacity": {"storage": spec["resources"]["requests"]["storage"]},
                "accessModes": spec["accessModes"],
                "storageClassName": STORAGE_CLASS,
                "persistentVolumeReclaimPolicy": "Delete",
                "hostPath": {"path": str(path)},
                "claimRef": reference,
            },
        }
        await allow(self._api.call("POST", VOLUMES, document), 409)

    async def _remove(self, volume: Object) -> None:
        meta = volume["metadata"]
        shutil.rmtree(volume["spec"]["hostPath"]["path"], ignore_errors=True)
        await self._api.delete(f"{VOLUMES}/{meta['name']}", meta["uid"])

    def _start(self, work: Any) -> None:
        async def attempt() -> None:
            try:
                await work
            except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as error:
                print(f"storage: {error}", flush=True)

        task = asyncio.create_task(attempt())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
