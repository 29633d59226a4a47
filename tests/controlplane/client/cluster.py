"""A cluster as its user sees it: kubectl and helm as typed, and objects by kind and name."""

import base64
import contextlib
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
from controlplane.client.discovery import Discovery
from controlplane.client.objects import Object
from controlplane.processes.certificates import write_kubeconfig
from controlplane.processes.control_plane import ControlPlane

POLL_SECONDS = 0.1
PATIENCE = 180.0
"""Seconds that a thing may take on a machine that is busy with others."""
RESTRICTED = {
    "pod-security.kubernetes.io/enforce": "restricted",
    "pod-security.kubernetes.io/warn": "restricted",
}


class CommandFailed(AssertionError):
    """kubectl or helm ended with an error; `answer` holds what it wrote."""

    def __init__(self, answer: "Answer") -> None:
        words = " ".join(answer.command)
        super().__init__(f"{words}\nended with {answer.code}\n{answer.err}{answer.out}")
        self.answer = answer


class Answer(str):
    """What a command wrote to stdout, with `err` (stderr), `code` (exit code) and `command`."""

    err: str
    code: int
    command: list[str]

    def __new__(cls, done: subprocess.CompletedProcess[str]) -> "Answer":
        answer = super().__new__(cls, done.stdout)
        answer.err, answer.code, answer.command = done.stderr, done.returncode, list(done.args)
        return answer

    @property
    def out(self) -> str:
        return str(self)


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
        deadline = time.monotonic() + 20
        while not socket.exists():
            self._proxy.check()
            assert time.monotonic() < deadline, "kubectl proxy made no socket in 20 s"
            time.sleep(0.02)
        transport = httpx.HTTPTransport(uds=str(socket), retries=3)
        self.api = httpx.Client(transport=transport, base_url="http://localhost", timeout=30)
        self._discovery = Discovery(self.api)

    @property
    def env(self) -> dict[str, str]:
        """Environment of a process that is to use this cluster as this user."""
        home = {
            name: str(self.folder / name.lower()) for name in ("HELM_CACHE_HOME", "KUBECACHEDIR")
        }
        return {"KUBECONFIG": str(self.kubeconfig), **home}

    @property
    def processes(self) -> ControlPlane:
        """The processes of the control plane: `processes.restart("kube-apiserver")`,
        `processes.audit()`. A test that asks for them is skipped on a cluster that is not ours."""
        if self._processes is None:
            pytest.skip("needs the processes of the control plane, and this cluster is not ours")
        return self._processes

    def close(self) -> None:
        self.api.close()
        self._proxy.signal(signal.SIGKILL)
        self._proxy.end()
        self._sockets.cleanup()

    # --- commands, as a user types them ---

    def kubectl(
        self, *words: str | Path, stdin: str = "", check: bool = True, timeout: float = 90
    ) -> Answer:
        """`kubectl WORDS`; CommandFailed unless check=False."""
        return self._run("kubectl", words, stdin, check, timeout)

    def helm(
        self, *words: str | Path, stdin: str = "", check: bool = True, timeout: float = 240
    ) -> Answer:
        """`helm WORDS`; CommandFailed unless check=False."""
        return self._run("helm", words, stdin, check, timeout)

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

    def create(self, document: Object, namespace: str = "default") -> Object:
        """POST, and the stored object back; httpx.HTTPStatusError with the answer when refused."""
        url = self.path(document["kind"], document["metadata"].get("namespace", namespace))
        answer = self.api.post(url, json=document)
        if answer.is_error:
            message = f"{answer.status_code}: {answer.json().get('message')}"
            raise httpx.HTTPStatusError(message, request=answer.request, response=answer)
        return dict(answer.json())

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
    def namespace(self, labels: Mapping[str, str] = RESTRICTED) -> Iterator[str]:
        """A new namespace, Pod Security `restricted` by default; its deletion is asked for at the
        end and not waited for."""
        name = f"test-{uuid.uuid4().hex[:8]}"
        meta = {"name": name, "labels": dict(labels)}
        self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
        # Pods are refused until the controller has made the account of a new namespace.
        account = lambda: self.find("serviceaccount", "default", name)  # noqa: E731
        self.until(account, f"ServiceAccount default of {name}")
        try:
            yield name
        finally:
            self.delete("namespace", name)

    def as_account(self, name: str, namespace: str, seconds: int = 3600) -> Path:
        """A kubeconfig with a token of a ServiceAccount: its rights and no others."""
        raw = json.loads(
            self.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json")
        )
        server = raw["clusters"][0]["cluster"]
        token = self.kubectl("create", "token", name, "-n", namespace, f"--duration={seconds}s")
        authority = base64.b64decode(server["certificate-authority-data"])
        path = self.folder / f"{namespace}-{name}-{uuid.uuid4().hex[:6]}.kubeconfig"
        return write_kubeconfig(path, server["server"], authority, name, {"token": token.strip()})


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
