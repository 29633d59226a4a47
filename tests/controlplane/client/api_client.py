"""The API server as the agents of the tests see it: calls, and lists that are then watched."""

import asyncio
import base64
import json
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
from controlplane.client.objects import Object

MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"
RETRY_SECONDS = 0.5


class ApiError(RuntimeError):
    """The API server refused a call; `status` is the HTTP status."""

    def __init__(self, call: str, status: int, message: str) -> None:
        super().__init__(f"{call}: {status} {message}")
        self.status, self.message = status, message


class ApiClient:
    """A client for one kubeconfig with a client certificate; use it in `async with`."""

    def __init__(self, kubeconfig: Path) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.url: str = cluster["server"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self._tls = ssl.create_default_context(cadata=authority)
        with tempfile.TemporaryDirectory() as folder:
            certificate, key = Path(folder, "certificate"), Path(folder, "key")
            for file in (certificate, key):
                file.write_bytes(base64.b64decode(user[f"client-{file.name}-data"]))
            self._tls.load_cert_chain(certificate, key)
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> "ApiClient":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._tls, limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            read_bufsize=1 << 22,  # one line of a watch holds a whole object
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def call(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        content: str = "application/json",
        **parameters: str,
    ) -> Object:
        """One call; ApiError when it is refused, OSError or aiohttp.ClientError on the way."""
        async with self._session.request(
            method,
            self.url + path,
            params=parameters,
            data=None if body is None else json.dumps(body),
            headers={"content-type": content},
            timeout=aiohttp.ClientTimeout(total=60),
        ) as answer:
            document = await answer.json(content_type=None)
            if answer.status >= 400:
                message = str(document.get("message"))
                raise ApiError(f"{method} {path}", answer.status, message)
            return dict(document)

    async def get(self, path: str, **parameters: str) -> Object:
        return await self.call("GET", path, None, "application/json", **parameters)

    async def find(self, path: str) -> Object | None:
        """The object, or None where there is none."""
        return await allow(self.get(path), 404)

    async def patch_status(self, path: str, uid: str, status: Object) -> None:
        """A merge patch of the status; nothing happens where that very object is gone."""
        body: Object = {"metadata": {"uid": uid}, "status": status}
        await allow(self.call("PATCH", f"{path}/status", body, MERGE), 404, 409)

    async def delete(self, path: str, uid: str, grace: int | None = None) -> None:
        """Deletes that very object; nothing happens where it is gone."""
        body: Object = {"preconditions": {"uid": uid}}
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        await allow(self.call("DELETE", path, body), 404, 409)

    async def apply(self, path: str, document: Object, manager: str) -> Object:
        """Server-side apply, by force."""
        return await self.call("PATCH", path, document, APPLY, fieldManager=manager, force="true")

    async def watch(
        self, path: str, handle: Callable[[str, Object], None], **parameters: str
    ) -> None:
        """Lists and watches for ever; `handle(type, object)` gets every change in order, and ADDED
        for each object of a list. Ends only by being cancelled."""
        known: dict[str, Object] = {}
        while True:
            try:
                listed = await self.get(path, **parameters)
                kind = listed["kind"].removesuffix("List")
                fresh = {
                    item["metadata"]["uid"]: {**item, "kind": kind} for item in listed["items"]
                }
                for uid in known.keys() - fresh.keys():
                    handle("DELETED", known[uid])
                known = fresh
                for item in fresh.values():
                    handle("ADDED", item)
                version = listed["metadata"]["resourceVersion"]
                await self._follow(path, handle, known, {**parameters, "resourceVersion": version})
            except (OSError, aiohttp.ClientError, TimeoutError, ApiError, ValueError) as error:
                print(f"watch of {path}: {error}", flush=True)
                await asyncio.sleep(RETRY_SECONDS)

    async def _follow(
        self,
        path: str,
        handle: Callable[[str, Object], None],
        known: dict[str, Object],
        parameters: dict[str, str],
    ) -> None:
        query = {**parameters, "watch": "1"}
        async with self._session.get(self.url + path, params=query) as answer:
            while line := await answer.content.readline():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return
                item, uid = event["object"], event["object"]["metadata"]["uid"]
                if event["type"] == "DELETED":
                    known.pop(uid, None)
                else:
                    known[uid] = item
                handle(event["type"], item)


async def allow(call: Any, *statuses: int) -> Any:
    """The call's answer, or None where it is refused with one of these statuses."""
    try:
        return await call
    except ApiError as error:
        if error.status not in statuses:
            raise
        return None
