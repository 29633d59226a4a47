"""What a model app says of itself: ``GET /internal/v1/status`` of its Service.

This is the only HTTP that the operator speaks with a model: one call for all replicas, never one
per pod. The app's dispatcher hears from every replica by heartbeat.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from calotype.operator.kube.client import KubeClient
from calotype.operator.kube.resources import SECRETS
from calotype.operator.settings import OperatorSettings

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 5.0
TOKEN_SECONDS = 60.0
"""A token that was read longer ago is read again."""
MOST_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Report:
    """One answer of a model app, or why there is none."""

    reachable: bool
    ready: bool = False
    replicas: int = 0
    queue_seconds: float = 0.0
    config_hash: str = ""
    message: str = ""
    states: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def ready_replicas(self) -> int:
        return sum(1 for state in self.states if state.get("ready"))

    def adapter_states(self) -> dict[str, tuple[Any, ...]]:
        """Adapter -> what all replicas say of it, for comparing two reports."""
        found: dict[str, list[Any]] = {}
        for state in self.states:
            for name, told in (state.get("adapters") or {}).items():
                found.setdefault(name, []).append(
                    (
                        state.get("replica"),
                        bool(state.get("ready")),
                        told.get("state"),
                        told.get("revision"),
                    )
                )
        return {name: tuple(sorted(told, key=str)) for name, told in found.items()}

    def replica_set(self) -> frozenset[tuple[Any, bool]]:
        return frozenset((s.get("replica"), bool(s.get("ready"))) for s in self.states)

    def has(self, adapter: str) -> bool:
        """Whether a replica still knows an adapter."""
        return any(adapter in (state.get("adapters") or {}) for state in self.states)


def read_report(told: Any) -> Report:
    """The report of an answer's JSON; what is missing is taken as not ready."""
    if not isinstance(told, Mapping):
        return Report(False, message="The model app's status is no JSON object.")
    states = [s for s in told.get("replicaStates") or () if isinstance(s, Mapping)]
    message = next((str(s["message"]) for s in states if s.get("message")), "")
    return Report(
        reachable=True,
        ready=bool(told.get("ready")),
        replicas=int(told.get("replicas") or len(states)),
        queue_seconds=max(0.0, float(told.get("queueSeconds") or 0.0)),
        config_hash=str(told.get("configHash") or ""),
        message=message,
        states=tuple(states),
    )


class ModelApps:
    """Asks model apps, with the token of the release."""

    def __init__(self, kube: KubeClient, settings: OperatorSettings) -> None:
        self._kube, self._settings = kube, settings
        self._session: aiohttp.ClientSession | None = None
        self._token = ""
        self._token_time = float("-inf")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def url(self, service: str, namespace: str) -> str:
        return self._settings.model_url.format(service=service, namespace=namespace)

    async def status(self, url: str) -> Report:
        """The model app's word; never raises."""
        told = await self.get(f"{url}/internal/v1/status")
        return told if isinstance(told, Report) else read_report(told)

    async def get(self, url: str) -> Any:
        """The JSON of an internal address, or a `Report` that says why there is none."""
        try:
            answer = await self._get(url, await self._bearer())
            if answer.status == 401:
                answer = await self._get(url, await self._bearer(renewed=True))
            if answer.status != 200:
                return Report(False, message=f"{url} answers {answer.status}.")
            return json.loads(answer.body)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            said = str(error) or type(error).__name__
            return Report(False, message=f"{url} cannot be reached: {said}")

    async def _get(self, url: str, token: str) -> _Answer:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
            )
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with self._session.get(url, headers=headers) as response:
            body = await response.content.read(MOST_BYTES)
            while not response.content.at_eof() and len(body) < MOST_BYTES:
                body += await response.content.read(MOST_BYTES - len(body))
            return _Answer(response.status, body)

    async def _bearer(self, renewed: bool = False) -> str:
        ref = self._settings.internal_token_secret_ref
        if ref is None:
            return ""
        if renewed or time.monotonic() - self._token_time > TOKEN_SECONDS:
            secret = await self._kube.get(SECRETS, self._settings.operator_namespace, ref.name)
            encoded = ((secret or {}).get("data") or {}).get(ref.key, "")
            self._token = base64.b64decode(encoded).decode().strip()
            self._token_time = time.monotonic()
        return self._token


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes
