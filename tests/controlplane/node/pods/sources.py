"""What pods read from the API: ConfigMaps, Secrets and tokens of their ServiceAccount."""

import base64
import time

from controlplane.client.api_client import ApiClient


class MissingSource(RuntimeError):
    """A ConfigMap or Secret, or a key of it, that a pod needs is not there (yet)."""


class Sources:
    """The sources of one pod."""

    def __init__(self, api: ApiClient, namespace: str, pod: str, uid: str, account: str) -> None:
        self._api, self.namespace = api, namespace
        self._pod, self._uid, self._account = pod, uid, account
        # By audience: the moment of the monotonic clock from which on it is asked for anew.
        self._tokens: dict[str | None, tuple[float, bytes]] = {}

    async def data(self, kind: str, name: str, optional: bool = False) -> dict[str, bytes]:
        """Every key of a `configMap` or `secret`; MissingSource, or nothing where optional."""
        path = f"/api/v1/namespaces/{self.namespace}/{kind.lower()}s/{name}"
        found = await self._api.find(path)
        if found is None:
            if optional:
                return {}
            raise MissingSource(f'{kind.lower()} "{name}" not found')
        plain, encoded = found.get("data") or {}, found.get("binaryData") or {}
        if kind == "secret":
            plain, encoded = {}, plain
        decoded = {key: base64.b64decode(text) for key, text in encoded.items()}
        return {**{key: text.encode() for key, text in plain.items()}, **decoded}

    async def keys(
        self, kind: str, name: str, items: list[dict[str, str]] | None, optional: bool
    ) -> dict[str, bytes]:
        """Files by relative path: every key, or those of `items` under their paths."""
        data = await self.data(kind, name, optional)
        if not items:
            return data
        missing = [item["key"] for item in items if item["key"] not in data]
        if missing and not optional:
            raise MissingSource(f'{kind.lower()} "{name}" has no key {missing[0]!r}')
        return {item["path"]: data[item["key"]] for item in items if item["key"] in data}

    async def token(self, audience: str | None, seconds: int) -> bytes:
        """A token of the pod's ServiceAccount that ends with the pod; a new one in good time."""
        renewal, known = self._tokens.get(audience, (0.0, b""))
        if time.monotonic() < renewal:
            return known
        bound = {"apiVersion": "v1", "kind": "Pod", "name": self._pod, "uid": self._uid}
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [audience] if audience else [],
                "expirationSeconds": seconds,
                "boundObjectRef": bound,
            },
        }
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{self._account}/token"
        answer = await self._api.call("POST", path, request)
        token = str(answer["status"]["token"]).encode()
        self._tokens[audience] = (time.monotonic() + 0.8 * seconds, token)
        return token
