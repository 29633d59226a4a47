"""A cluster as its user sees it: kubectl and helm as typed, and objects by kind and name."""

import base64
import contextlib
import functools
import json
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from controlplane.child_process import ChildProcess
from controlplane.client.commands import Answer, CommandFailed
from controlplane.client.diagnosis import describe_pods
from controlplane.client.discovery import Discovery
from controlplane.client.dry_run import PARAMETERS, DryRun
from controlplane.client.objects import Object
from controlplane.client.transport import RepeatingTransport
from controlplane.processes.certificates import write_kubeconfig
from controlplane.processes.control_plane import ControlPlane

POLL_SECONDS = 0.1
APPLY = "application/apply-patch+yaml"
PATIENCE = 180.0
"""Seconds that a thing may take on a machine that is busy with others."""
RESTRICTED = {
    "pod-security.kubernetes.io/enforce": "restricted",
    "pod-security.kubernetes.io/warn": "restricted",
}

OPEN: set["Cluster"] = set()
"""The clusters of this test run that are not closed yet."""


class Cluster:
    """One user of one cluster. Objects are the plain dicts of the API."""

    def __init__(
        self,
        kubeconfig: Path,
        binaries: Mapping[str, Path],
        folder: Path,
        control_plane: ControlPlane | None = None,
    ) -> None:
        self.kubeconfig, self.folder, self._processes = kubeconfig, folder, control_plane
        self._binaries = dict(binaries)
        # A socket file, so that nobody else on this machine can use the proxy's credentials.
        self._sockets = tempfile.TemporaryDirectory(prefix="calotype-")
        socket = Path(self._sockets.name, "api")
        command = [str(self._binaries["kubectl"]), "proxy", f"--unix-socket={socket}"]
        self._proxy = ChildProcess("kubectl proxy", command, folder / "proxy.log", self.env)
        deadline = time.monotonic() + 60
        while not socket.exists():
            self._proxy.check()
            assert time.monotonic() < deadline, "kubectl proxy made no socket in 60 s"
            time.sleep(0.02)
        transport = RepeatingTransport(uds=str(socket), retries=3)
        self.api = httpx.Client(transport=transport, base_url="http://localhost", timeout=60)
        self._discovery = Discovery(self.api)
        OPEN.add(self)

    @property
    def env(self) -> dict[str, str]:
        """Environment of a process that is to use this cluster as this user."""
        home = {
            name: str(self.folder / name.lower()) for name in ("HELM_CACHE_HOME", "KUBECACHEDIR")
        }
        return {"KUBECONFIG": str(self.kubeconfig), **home}

    @property
    def foreign(self) -> bool:
        """Whether the cluster is somebody else's and outlives the tests."""
        return self._processes is None

    @property
    def processes(self) -> ControlPlane:
        """The processes of the control plane: `processes.restart("kube-apiserver")`,
        `processes.audit()`. A test that asks for them is skipped on a cluster that is not ours."""
        if self._processes is None:
            pytest.skip("needs the processes of the control plane, and this cluster is not ours")
        return self._processes

    def close(self) -> None:
        OPEN.discard(self)
        self.api.close()
        self._proxy.signal(signal.SIGKILL)
        self._proxy.end()
        self._sockets.cleanup()

    # --- commands, as a user types them ---

    def kubectl(
        self, *words: str | Path, stdin: str = "", check: bool = True, timeout: float = 300
    ) -> Answer:
        """`kubectl WORDS`; CommandFailed unless check=False."""
        return self._run("kubectl", words, stdin, check, timeout)

    def helm(
        self, *words: str | Path, stdin: str = "", check: bool = True, timeout: float = 900
    ) -> Answer:
        """`helm WORDS`; CommandFailed, with what the release's pods say, unless check=False."""
        answer = self._run("helm", words, stdin, False, timeout)
        if check and answer.code:
            namespace = str(words[words.index("-n") + 1]) if "-n" in words else "default"
            raise CommandFailed(answer, f"\n{describe_pods(self.api, namespace)}")
        return answer

    def _run(
        self, program: str, words: Sequence[str | Path], stdin: str, check: bool, timeout: float
    ) -> Answer:
        done = subprocess.run(
            [str(self._binaries[program]), *map(str, words)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **self.env},
        )
        answer = Answer(done)
        if check and answer.code:
            raise CommandFailed(answer)
        return answer

    def apply(
        self, what: str | Path | Object | list[Object], *words: str, check: bool = True
    ) -> Answer:
        """`kubectl apply -f`: a path, YAML text, an object or a list; WORDS such as --server-side,
        --dry-run=server or -n NAMESPACE come after it."""
        if isinstance(what, Path):
            return self.kubectl("apply", "-f", str(what), *words, check=check)
        if isinstance(what, list):
            what = {"apiVersion": "v1", "kind": "List", "items": what}
        text = what if isinstance(what, str) else json.dumps(what)
        return self.kubectl("apply", "-f", "-", *words, stdin=text, check=check)

    # --- objects ---

    def get(self, kind: str, name: str, namespace: str = "default") -> Object:
        """One object; LookupError when there is none."""
        if (found := self.find(kind, name, namespace)) is None:
            raise LookupError(f"no {kind} {namespace}/{name}")
        return found

    def find(self, kind: str, name: str, namespace: str = "default") -> Object | None:
        """One object, or None."""
        answer = self.api.get(self.path(kind, namespace, name))
        if answer.status_code == 404:
            return None
        return dict(answer.raise_for_status().json())

    def items(
        self, kind: str, namespace: str | None = "default", selector: str = ""
    ) -> list[Object]:
        """Every object of a kind; namespace None means all namespaces."""
        parameters = {"labelSelector": selector} if selector else {}
        answer = self.api.get(self.path(kind, namespace), params=parameters).raise_for_status()
        return [dict(item) for item in answer.json()["items"]]

    def dry_run(self, document: Object, namespace: str = "default") -> DryRun:
        """What the API server says of server-side apply of an object; nothing is stored."""
        where = document["metadata"].get("namespace", namespace)
        answer = self.api.patch(
            self.path(document["kind"], where, document["metadata"]["name"]),
            params={**PARAMETERS, "fieldManager": "tests", "force": "true"},
            content=json.dumps(document),
            headers={"content-type": APPLY},
        )
        return DryRun.of(answer)

    def dry_create(self, document: Object, namespace: str = "default") -> DryRun:
        """What the API server says of a new object; nothing is stored."""
        where = document["metadata"].get("namespace", namespace)
        url = self.path(document["kind"], where)
        return DryRun.of(self.api.post(url, params=PARAMETERS, json=document))

    def dry_replace(self, document: Object, namespace: str = "default") -> DryRun:
        """What the API server says of another spec for an object that is there."""
        url = self.path(document["kind"], namespace, document["metadata"]["name"])
        stored = self.api.get(url).raise_for_status().json()
        changed = {**stored, "spec": document["spec"]}
        return DryRun.of(self.api.put(url, params=PARAMETERS, json=changed))

    def create(self, document: Object, namespace: str = "default") -> Object:
        """POST, and the stored object back; httpx.HTTPStatusError with the answer when refused."""
        url = self.path(document["kind"], document["metadata"].get("namespace", namespace))
        answer = self.api.post(url, json=document)
        if answer.is_error:
            message = f"{answer.status_code}: {answer.json().get('message')}"
            raise httpx.HTTPStatusError(message, request=answer.request, response=answer)
        return dict(answer.json())

    def apply_objects(self, *documents: Object, namespace: str = "default") -> list[Object]:
        """Server-side apply, by force, as `kubectl apply --server-side` does it."""
        stored = []
        for document in documents:
            where = document["metadata"].get("namespace", namespace)
            answer = self.api.patch(
                self.path(document["kind"], where, document["metadata"]["name"]),
                params={"fieldManager": "tests", "force": "true"},
                content=json.dumps(document),
                headers={"content-type": APPLY},
            )
            assert answer.is_success, f"{document['kind']}: {answer.text}"
            stored.append(dict(answer.json()))
        return stored

    def patch(
        self, kind: str, name: str, change: Object, namespace: str = "default", sub: str = ""
    ) -> Object:
        """A merge patch of the object, or of its subresource (`sub="status"`)."""
        url = self.path(kind, namespace, name) + (f"/{sub}" if sub else "")
        headers = {"content-type": "application/merge-patch+json"}
        answer = self.api.patch(url, content=json.dumps(change), headers=headers)
        return dict(answer.raise_for_status().json())

    def delete(
        self, kind: str, name: str, namespace: str = "default", grace: int | None = None
    ) -> None:
        """Asks for the deletion and returns at once; `wait_gone` waits."""
        options = {} if grace is None else {"gracePeriodSeconds": grace}
        answer = self.api.request("DELETE", self.path(kind, namespace, name), json=options)
        if answer.status_code != 404:
            answer.raise_for_status()

    def delete_all(self, kind: str, namespace: str = "default", seconds: float = PATIENCE) -> None:
        """Deletes every object of a kind in a namespace, and returns when they are gone."""
        for found in self.items(kind, namespace):
            self.delete(kind, found["metadata"]["name"], namespace)
        self.until(lambda: not self.items(kind, namespace), f"no {kind} are left", seconds)

    def path(self, kind: str, namespace: str | None = "default", name: str | None = None) -> str:
        """The API path of a kind's list or of one object, for use with `api`."""
        return self._discovery.find(kind).url(namespace, name)

    def events(self, name: str, namespace: str = "default") -> list[Object]:
        """The events about an object of that name, oldest first."""
        found = [e for e in self.items("events", namespace) if _about(e).get("name") == name]
        return sorted(found, key=lambda event: event["metadata"]["creationTimestamp"])

    # --- waiting ---

    def until(self, holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
        """Polls until `holds()` is true and returns it; AssertionError says what never came."""
        deadline = time.monotonic() + seconds
        while not (result := holds()):
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
            time.sleep(POLL_SECONDS)
        return result

    def wait(
        self,
        kind: str,
        name: str,
        holds: Callable[[Object], Any] | str,
        namespace: str = "default",
        seconds: float = PATIENCE,
    ) -> Object:
        """The object as soon as `holds(object)`, or as soon as a condition has a status:
        "Ready" and "Ready=False" are conditions. The last state is in the failure's message."""
        check = condition(holds) if isinstance(holds, str) else holds
        deadline = time.monotonic() + seconds
        while True:
            found = self.find(kind, name, namespace)
            if found is not None and check(found):
                return found
            if time.monotonic() > deadline:
                state = json.dumps((found or {}).get("status", found), indent=1)
                wanted = holds if isinstance(holds, str) else "the wanted state"
                raise AssertionError(
                    f"{kind} {namespace}/{name}: not {wanted} within {seconds:.0f} s:\n{state}"
                )
            time.sleep(POLL_SECONDS)

    def wait_gone(
        self, kind: str, name: str, namespace: str = "default", seconds: float = PATIENCE
    ) -> None:
        """Returns when there is no such object any more."""
        gone = lambda: self.find(kind, name, namespace) is None  # noqa: E731
        self.until(gone, f"{kind} {namespace}/{name} is gone", seconds)

    # --- namespaces and users ---

    @contextlib.contextmanager
    def namespace(
        self, labels: Mapping[str, str] = RESTRICTED, keep: bool = False
    ) -> Iterator[str]:
        """A new namespace, Pod Security `restricted` by default; its deletion is asked for at the
        end and not waited for. A control plane of ours goes with what it holds: there a namespace
        without pods stays, and one that is to be kept, because a deletion takes the API server half
        a second of CPU."""
        name = f"test-{uuid.uuid4().hex[:8]}"
        meta = {"name": name, "labels": dict(labels)}
        self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
        # Pods are refused until the controller has made the account of a new namespace.
        account = lambda: self.find("serviceaccount", "default", name)  # noqa: E731
        self.until(account, f"ServiceAccount default of {name}")
        try:
            yield name
        finally:
            if self.foreign or (not keep and self.items("pods", name)):
                self.delete("namespace", name)

    def as_account(self, name: str, namespace: str, seconds: int = 3600) -> Path:
        """A kubeconfig with a token of a ServiceAccount: its rights and no others."""
        server, authority = self.endpoint
        path = self.folder / f"{namespace}-{name}-{uuid.uuid4().hex[:6]}.kubeconfig"
        credentials = {"token": self.token(name, namespace, seconds)}
        return write_kubeconfig(path, server, authority, name, credentials)

    def token(self, account: str, namespace: str, seconds: int = 3600) -> str:
        """A token of a ServiceAccount."""
        url = self.path("serviceaccount", namespace, account) + "/token"
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest"}
        answer = self.api.post(url, json={**request, "spec": {"expirationSeconds": seconds}})
        return str(answer.raise_for_status().json()["status"]["token"])

    @functools.cached_property
    def endpoint(self) -> tuple[str, bytes]:
        """The URL of the API server, and the certificate of its authority."""
        view = ("config", "view", "--raw", "--minify", "--flatten", "-o", "json")
        cluster = json.loads(self.kubectl(*view))["clusters"][0]["cluster"]
        return cluster["server"], base64.b64decode(cluster["certificate-authority-data"])


def condition(text: str) -> Callable[[Object], bool]:
    """A check of a condition, as in "Ready" or "Ready=False"; it must belong to the generation."""
    kind, _, status = text.partition("=")

    def holds(found: Object) -> bool:
        generation = found["metadata"].get("generation", 0)
        return any(
            one["type"] == kind
            and one["status"] == (status or "True")
            and one.get("observedGeneration", generation) >= generation
            for one in found.get("status", {}).get("conditions") or []
        )

    return holds


def _about(event: Object) -> Object:
    return dict(event.get("involvedObject") or event.get("regarding") or {})
