"""Asks model apps: ``GET /internal/v1/status`` of their Services.

This is the only HTTP that the operator speaks with a model: one call for all replicas, never one
per pod. The app's dispatcher hears from every replica by heartbeat.
"""

from __future__ import annotations

import base64
import functools
import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from calotype.operator.kube.client import KubeClient
from calotype.operator.kube.resources import SECRETS
from calotype.operator.planning.model_report import ModelReport, read_report, unreachable
from calotype.operator.settings import OperatorSettings
from calotype.serving.wire.model_token import ModelIdentity, make_model_token

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 5.0
TOKEN_SECONDS = 60.0
"""A token that was read longer ago is read again."""
MOST_BYTES = 32 * 1024 * 1024


class NoAnswer(Exception):
    """A model app did not answer; one sentence says why."""


class ModelApps:
    """Asks model apps, each with its own token."""

    def __init__(self, kube: KubeClient, settings: OperatorSettings) -> None:
        self._kube, self._settings = kube, settings
        self._session: aiohttp.ClientSession | None = None
        self._token = ""
        self._token_time = float("-inf")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def url(self, service: str, namespace: str, scheme: str | None = None) -> str:
        """Args:
        scheme: None = that of model apps.
        """
        return self._settings.model_url.format(
            scheme=scheme or self._settings.scheme, service=service, namespace=namespace
        )

    async def status(self, url: str, model: ModelIdentity) -> ModelReport:
        """How the model app at that base URL is; never raises."""
        try:
            token = functools.partial(make_model_token, model=model)
            return read_report(await self.get(f"{url}/internal/v1/status", token))
        except NoAnswer as error:
            return unreachable(str(error))

    async def get(self, url: str, token: Callable[[str], str] | None = None) -> bytes:
        """The body of an internal address.

        Args:
            token: what is shown, of the internal token; None = nothing is.

        Raises:
            NoAnswer: it cannot be reached, or answers with another status than 200.
        """
        try:
            answer = await self._get(url, await self._shown(token))
            if answer.status == 401:
                answer = await self._get(url, await self._shown(token, renewed=True))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            said = str(error) or type(error).__name__
            raise NoAnswer(f"{url} cannot be reached: {said}") from error
        if answer.status != 200:
            raise NoAnswer(f"{url} answers {answer.status}.")
        return answer.body

    async def _get(self, url: str, token: str) -> _Answer:
        if self._session is None:
            tls = self._settings.models_tls
            believed = True if tls is None else ssl.create_default_context(cafile=tls.ca_file)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=believed),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
            )
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with self._session.get(url, headers=headers) as response:
            body = await response.content.read(MOST_BYTES)
            while not response.content.at_eof() and len(body) < MOST_BYTES:
                body += await response.content.read(MOST_BYTES - len(body))
            return _Answer(response.status, body)

    async def _shown(self, token: Callable[[str], str] | None, renewed: bool = False) -> str:
        internal = "" if token is None else await self.internal_token(renewed)
        return token(internal) if internal and token is not None else ""

    async def internal_token(self, renewed: bool = False) -> str:
        """The internal token of the release; empty where the settings name none."""
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
