"""gateway.json as the API server of Kubernetes has it at this moment.

A kubelet brings a mounted ConfigMap up to date within a minute or two; an adapter that is Ready, or
a key that was taken back, shall not wait for that. The ServiceAccount may read this one object.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pathlib
import ssl
from collections.abc import Mapping

import httpx

log = logging.getLogger(__name__)

ACCOUNT = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_SECONDS = 5.0
_ONLY_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


class ConfigMapReader:
    """Reads one key of one ConfigMap in the pod's own namespace.

    Args:
        name: of the ConfigMap.
        key: of its data.
        account: the folder with the ServiceAccount's token, ca.crt and namespace.
    """

    def __init__(
        self,
        name: str,
        key: str,
        account: pathlib.Path = ACCOUNT,
        variables: Mapping[str, str] = os.environ,
    ) -> None:
        self._name, self._key, self._account = name, key, account
        self._host = variables.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
        self._port = variables.get("KUBERNETES_SERVICE_PORT", "443")
        self._client: httpx.AsyncClient | None = None
        self._version = ""
        self._content: bytes | None = None
        self._told = ""

    async def read(self) -> bytes | None:
        """The content; None when the API server could not be asked, or has none."""
        try:
            version = await self._get(_ONLY_METADATA)
            found = version["metadata"]["resourceVersion"]
            if found != self._version:
                whole = await self._get("application/json")
                content = (whole.get("data") or {}).get(self._key)
                self._content = None if content is None else content.encode()
                self._version = whole["metadata"]["resourceVersion"]
        except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
            self._complain(f"{type(error).__name__}: {error}")
            return None
        self._told = ""
        return self._content

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _get(self, accept: str) -> dict[str, dict[str, str]]:
        token, namespace = await asyncio.to_thread(self._credentials)
        if self._client is None:
            trust = await asyncio.to_thread(
                ssl.create_default_context, cafile=str(self._account / "ca.crt")
            )
            host = f"[{self._host}]" if ":" in self._host else self._host
            self._client = httpx.AsyncClient(
                base_url=f"https://{host}:{self._port}",
                verify=trust,
                timeout=TIMEOUT_SECONDS,
                trust_env=False,
            )
        answer = await self._client.get(
            f"/api/v1/namespaces/{namespace}/configmaps/{self._name}",
            headers={"authorization": f"Bearer {token}", "accept": accept},
        )
        answer.raise_for_status()
        found: dict[str, dict[str, str]] = answer.json()
        return found

    def _credentials(self) -> tuple[str, str]:
        """Read every time: the kubelet renews the token."""
        read = (self._account / name for name in ("token", "namespace"))
        token, namespace = (path.read_text().strip() for path in read)
        return token, namespace

    def _complain(self, problem: str) -> None:
        if problem != self._told:
            self._told = problem
            log.warning("ConfigMap %s is read from its volume instead: %s", self._name, problem)
