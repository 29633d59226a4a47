"""Secrets that custom resources name: are they there, and do they hold what the source needs?

Only Secrets that an object names are read, one by one; nothing is listed or watched. So a change is
seen by looking again: often while something waits for it, seldom otherwise.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass

from calotype.operator.api.conditions import Condition, Fact, Reason, false, true
from calotype.operator.kube.client import KubeClient
from calotype.operator.kube.labels import digest
from calotype.operator.kube.objects import Object
from calotype.operator.kube.resources import SECRETS

_READY = Condition.CREDENTIALS_READY


@dataclass(frozen=True, slots=True)
class Credentials:
    """What was found of a named Secret."""

    fact: Fact
    version: str = ""
    """Another one after every change of the keys that matter; empty without a Secret."""
    secret: Object | None = None

    @property
    def ready(self) -> bool:
        return self.fact.holds


class CredentialReader:
    """Reads Secrets, each at most once in ``seconds``, for a thousand adapters may name one."""

    def __init__(
        self, kube: KubeClient, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kube, self._seconds, self._clock = kube, seconds, clock
        self._read: dict[tuple[str, str], tuple[float, Object | None]] = {}

    async def check(
        self,
        namespace: str,
        name: str | None,
        keys: tuple[str, ...],
        field: str = "spec.credentialsSecretRef",
    ) -> Credentials:
        """The Secret ``name``, which must have ``keys``; ``field`` is where it is named."""
        if name is None:
            return Credentials(true(_READY, Reason.NOT_NEEDED, "No Secret is named."))
        return check_secret(namespace, name, keys, await self._secret(namespace, name), field)

    async def _secret(self, namespace: str, name: str) -> Object | None:
        at, found = self._read.get((namespace, name), (float("-inf"), None))
        if self._clock() - at > self._seconds / 2:
            found = await self._kube.get(SECRETS, namespace, name)
            self._read[namespace, name] = (self._clock(), found)
        return found


def check_secret(
    namespace: str,
    name: str,
    keys: tuple[str, ...],
    secret: Object | None,
    field: str = "spec.credentialsSecretRef",
) -> Credentials:
    """What a Secret, or its absence, means for a source that needs ``keys``."""
    where = f"Secret {name} in namespace {namespace}"
    if secret is None:
        wanted = " and ".join(keys) or "what the source needs"
        return Credentials(
            false(
                _READY,
                Reason.SECRET_MISSING,
                f"{where} does not exist: create it with {wanted}, or correct {field}.",
            )
        )
    data = secret.get("data") or {}
    missing = [key for key in keys if not _text(data.get(key))]
    if missing:
        there = ", ".join(sorted(data)) or "no keys at all"
        return Credentials(
            false(
                _READY,
                Reason.SECRET_KEY_MISSING,
                f"{where} has {there}, but the key {' and '.join(missing)} is needed, "
                f"not empty, by {field}.",
            )
        )
    version = digest({key: data[key] for key in keys})
    fact = true(_READY, Reason.CREDENTIALS_FOUND, f"{where} has {' and '.join(keys) or 'keys'}.")
    return Credentials(fact, version, secret)


def _text(encoded: str | None) -> str:
    try:
        return base64.b64decode(encoded or "").decode("utf-8", "replace").strip()
    except ValueError:
        return ""
