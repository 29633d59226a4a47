"""The calls on a Ray head: Serve's applications, the proxy's health, and jobs."""

import json

import aiohttp
import yaml
from controlplane.client.objects import Object
from controlplane.kuberay.pods import DASHBOARD_PORT, head_service_name

SECONDS = aiohttp.ClientTimeout(total=10)
"""KubeRay waits two seconds, and takes a head that is only slow out of the traffic."""


class Refused(OSError):
    """The head answered with an error."""


class Dashboard:
    """A head by the name of its Service, as KubeRay dials it."""

    def __init__(self, session: aiohttp.ClientSession, namespace: str, cluster: str) -> None:
        self._session = session
        host = f"{head_service_name(cluster)}.{namespace}.svc.cluster.local"
        self.url = f"http://{host}:{DASHBOARD_PORT}"

    async def applications(self) -> dict[str, Object]:
        """Every Serve application by its name."""
        path = "/api/serve/applications/"
        answer = await self._call("GET", path, {"api_type": "declarative"})
        return dict(answer.get("applications") or {})

    async def deploy(self, config: str) -> None:
        """Serve's configuration, given as the YAML of serveConfigV2."""
        await self._call("PUT", "/api/serve/applications/", body=yaml.safe_load(config))

    async def job(self, name: str) -> Object | None:
        """A job's record, or None where there is none."""
        try:
            return await self._call("GET", f"/api/jobs/{name}")
        except Refused as error:
            if error.errno == 404:
                return None
            raise

    async def healthy(self, address: str, port: int) -> bool:
        """Whether the Serve proxy of a pod answers."""
        try:
            url = f"http://{address}:{port}/-/healthz"
            async with self._session.get(url, timeout=SECONDS) as answer:
                return answer.status == 200
        except (OSError, TimeoutError, aiohttp.ClientError):
            return False

    async def _call(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Object | None = None,
    ) -> Object:
        call = self._session.request(
            method, self.url + path, params=query, json=body, timeout=SECONDS
        )
        async with call as answer:
            text = await answer.text()
            if answer.status >= 400:
                raise Refused(answer.status, f"{method} {path}: {text[:500]}")
            return dict(json.loads(text)) if text.strip().startswith("{") else {}
