"""What the chart's hooks do in the cluster.

    python hook.py apply FOLDER     default objects, server-side, never forced
    python hook.py stop             the operator, before an uninstallation

Python's standard library only, so that it runs in any image that has Python. The pod's own
ServiceAccount speaks.
"""

from __future__ import annotations

import http.client
import json
import os
import pathlib
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

# The variable is for who runs this outside a pod.
ACCOUNT = pathlib.Path(
    os.environ.get("CALOTYPE_SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount")
)
PLURALS = {"ImageModel": "imagemodels", "ModerationPolicy": "moderationpolicies", "Team": "teams"}
PATIENCE_SECONDS = 120.0
"""A kind is served some seconds after its definition; an operator ends within its grace period."""


class Refused(Exception):
    """The API server said no; the text is its own sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """The Kubernetes API, as the pod's ServiceAccount."""

    def __init__(self) -> None:
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
        port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        self._server = f"https://{f'[{host}]' if ':' in host else host}:{port}"
        self._token = (ACCOUNT / "token").read_text(encoding="utf-8")
        self._context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))

    def get(self, path: str) -> Any:
        return self._call("GET", path, "application/json", None)

    def patch(self, path: str, kind: str, body: object) -> Any:
        """``kind``: ``merge-patch+json`` or ``apply-patch+yaml``."""
        return self._call("PATCH", path, f"application/{kind}", json.dumps(body).encode())

    def _call(self, method: str, path: str, kind: str, data: bytes | None) -> Any:
        """
        Raises:
            Refused: the server's answer is no 2xx.
            OSError, http.client.HTTPException: there is no answer.
        """
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
        request = urllib.request.Request(self._server + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10, context=self._context) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                text = json.loads(text)["message"]
            except (ValueError, KeyError, TypeError):
                text = text or str(error)
            raise Refused(error.code, text) from None


def patiently(what: str, attempt: Callable[[], str | None]) -> None:
    """Repeats ``attempt`` until it returns None; a text is the reason why it has to be repeated.

    Raises:
        SystemExit: time is up, or the server's refusal is final; with a sentence.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        final = False
        try:
            reason = attempt()
        except Refused as error:
            final = error.status not in (404, 429) and error.status < 500
            reason = str(error)
        except (OSError, http.client.HTTPException) as error:
            reason = str(error)
        if reason is None:
            return
        if final or time.monotonic() > deadline:
            sys.exit(f"{what}: {reason}")
        time.sleep(1)


def apply(api: Api, folder: pathlib.Path) -> None:
    """Every ``*.json`` of the folder. A field that somebody changed with kubectl stays changed."""
    for file in sorted(folder.glob("*.json")):
        manifest = json.loads(file.read_text(encoding="utf-8"))
        metadata, kind = manifest["metadata"], manifest["kind"]
        name = f"{kind} {metadata['name']}"
        path = f"/apis/{manifest['apiVersion']}/namespaces/{metadata['namespace']}/{PLURALS[kind]}/"
        path += f"{metadata['name']}?fieldManager=calotype-chart"

        def attempt(name: str = name, path: str = path, manifest: object = manifest) -> None:
            try:
                api.patch(path, "apply-patch+yaml", manifest)
                print(f"{name}: applied.", flush=True)
            except Refused as error:
                if error.status != 409:
                    raise
                print(f"{name}: left as it is. {error}", flush=True)

        patiently(name, attempt)


def stop(api: Api, namespace: str, deployment: str, selector: str) -> None:
    """Scales the operator to nothing and waits until its pod is gone."""

    def attempt() -> str | None:
        try:
            api.patch(
                f"/apis/apps/v1/namespaces/{namespace}/deployments/{deployment}",
                "merge-patch+json",
                {"spec": {"replicas": 0}},
            )
        except Refused as error:
            if error.status == 404:  # somebody deleted it already
                return None
            raise
        query = urllib.parse.urlencode({"labelSelector": selector})
        pods = api.get(f"/api/v1/namespaces/{namespace}/pods?{query}")["items"]
        return f"{len(pods)} of its pods still run" if pods else None

    patiently(f"The operator {deployment} could not be stopped", attempt)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["apply", folder]:
            apply(Api(), pathlib.Path(folder))
        case ["stop"]:
            stop(
                Api(),
                os.environ["CALOTYPE_OPERATOR_NAMESPACE"],
                os.environ["CALOTYPE_DEPLOYMENT"],
                os.environ["CALOTYPE_SELECTOR"],
            )
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
