"""One container of a pod: its runs, its state, and how it is ended."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from controlplane.child_process import dies_with_parent
from controlplane.client.objects import Object
from controlplane.node.images import Image
from controlplane.node.pods import memory, probes, quantity
from controlplane.node.pods.environment import ConfigError, expand
from controlplane.node.pods.security import Identity

LAUNCH = Path(__file__).with_name("launch.py")
RETRY_SECONDS, MESSAGE_BYTES, LOG_LINES = 1.0, 4096, 80
FIRST_DELAY, LONGEST_DELAY, GOOD_RUN = 10.0, 300.0, 600.0


class PodContext(Protocol):
    """What a container needs of its pod."""

    spec: Object
    uid: str
    folder: Path
    address: str
    stopping: bool
    delay_scale: float

    def image(self, name: str) -> Image | None: ...
    def log(self, container: str, restarts: int) -> Path: ...
    def holder(self) -> int: ...
    def grace(self) -> float: ...
    def mounts(self, container: Object, env: dict[str, str]) -> list[tuple[Path, str, bool]]: ...
    async def environment(self, container: Object, image: Image) -> dict[str, str]: ...
    def changed(self) -> None: ...
    def event(self, kind: str, reason: str, message: str, container: str) -> None: ...


class Container:
    """`state` and `last` are a ContainerState of the API; `pid` is process 1, seen from here."""

    def __init__(self, pod: PodContext, spec: Object, init: bool = False) -> None:
        self.pod, self.spec, self.init = pod, spec, init
        self.name: str = spec["name"]
        self.sidecar = init and spec.get("restartPolicy") == "Always"
        self.restarts = 0
        self.last: Object = {}
        self.state: Object = {"waiting": {"reason": "PodInitializing"}}
        self.ready = self.started = False
        self.pid: int | None = None
        self.env: dict[str, str] = {}
        self.user = (0, 0)
        self._process: Process | None = None
        self._reason = ""
        self._created = False

    @property
    def address(self) -> str:
        return self.pod.address

    def status(self) -> Object:
        """A ContainerStatus of the API."""
        image = self.spec["image"]
        status: Object = {
            "name": self.name,
            "image": image,
            "imageID": f"process://{image}" if self._created else "",
            "ready": self.ready,
            "started": self.started,
            "restartCount": self.restarts,
            "state": self.state,
            "lastState": self.last,
        }
        if self._created:
            status["containerID"] = self._id()
        return status

    async def run(self) -> int:
        """Runs the container as often as the policy says; the last exit code."""
        policy = self.spec.get("restartPolicy") or self.pod.spec.get("restartPolicy", "Always")
        delay = 0.0
        while True:
            began = time.monotonic()
            code = await self._run_once()
            again = policy == "Always" or (policy == "OnFailure" and code != 0)
            if self.init and not self.sidecar:
                again = policy != "Never" and code != 0
            if self.pod.stopping or not again:
                return code
            self.last = self.state
            if time.monotonic() - began > GOOD_RUN:
                delay = 0.0
            if delay:
                message = f"back-off {delay:.0f}s restarting failed container={self.name}"
                self._wait("CrashLoopBackOff", message)
                self.pod.event("Warning", "BackOff", message, self.name)
                await asyncio.sleep(delay * self.pod.delay_scale)
            delay = min(delay * 2 or FIRST_DELAY, LONGEST_DELAY)
            self.restarts += 1

    async def kill(self, grace: float) -> None:
        """preStop, SIGTERM, and SIGKILL when `grace` seconds are over; at once where it is 0."""
        deadline = time.monotonic() + grace
        hook = self.spec.get("lifecycle", {}).get("preStop")
        if hook and self.pid and grace:
            await probes.act(self, hook, grace)
        if self.pid is None or self._process is None:
            return
        left = deadline - time.monotonic()
        self.signal(signal.SIGTERM if left > 0 else signal.SIGKILL)
        if left > 0:
            try:
                async with asyncio.timeout(left):
                    await self._process.wait()
            except TimeoutError:
                self.signal(signal.SIGKILL)

    def signal(self, sign: int) -> None:
        """Sends a signal to process 1, which it ignores unless it handles it, save SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            if self.pid is not None:
                os.kill(self.pid, sign)

    def _wait(self, reason: str, message: str = "") -> None:
        state = {"reason": reason, **({"message": message} if message else {})}
        if self.state != {"waiting": state}:
            self.state = {"waiting": state}
            self.pod.changed()

    def _id(self) -> str:
        return f"process://{self.pod.uid}-{self.name}-{self.restarts}"

    async def _run_once(self) -> int:
        folder = self.pod.folder / f"{self.name}-{self.restarts}"
        spec = await self._prepared(folder)
        log = self.pod.log(self.name, self.restarts)
        state = Path(spec["state"])
        with log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(LAUNCH), str(folder / "spec.json")),
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=dies_with_parent(signal.SIGKILL),
            )
        while not state.exists() and self._process.returncode is None:
            await asyncio.sleep(0.01)
        self.pid = int(state.read_text()) if state.exists() else None
        began = _now()
        self._created, self._reason = True, ""
        self.started = "startupProbe" not in self.spec
        self.ready = self.started and "readinessProbe" not in self.spec and not self.init
        self.state = {"running": {"startedAt": began}}
        self.pod.changed()
        tasks = self._watchers()
        if self.pid and (hook := self.spec.get("lifecycle", {}).get("postStart")):
            tasks.append(asyncio.create_task(self._post_start(hook)))
        try:
            code = await self._process.wait()
        finally:
            for task in tasks:
                task.cancel()
            self.signal(signal.SIGKILL)  # still there only where this task is cancelled
            self._process = self.pid = None
        self.started, self.ready = False, self.init and code == 0
        self.state = {"terminated": self._ended(code, began, log, folder / "termination-log")}
        shutil.rmtree(folder, ignore_errors=True)
        self.pod.changed()
        return code

    async def _prepared(self, folder: Path) -> Object:
        """The launcher's file; waits, and says for what, until image and sources are there."""
        while True:
            image = self.pod.image(self.spec["image"])
            try:
                if image is not None:
                    return await self._prepare(folder, image)
                self._pull_failed()
            except RuntimeError as error:
                self._wait("CreateContainerConfigError", str(error))
            await asyncio.sleep(RETRY_SECONDS)

    def _pull_failed(self) -> None:
        name = self.spec["image"]
        seen = self.state.get("waiting", {}).get("reason") in ("ErrImagePull", "ImagePullBackOff")
        message = f'image "{name}" is not in the table of this node'
        if not seen:
            self.pod.event("Warning", "Failed", f'Failed to pull image "{name}"', self.name)
        self._wait("ImagePullBackOff" if seen else "ErrImagePull", message)

    async def _prepare(self, folder: Path, image: Image) -> Object:
        identity = Identity.of(self.pod.spec, self.spec, image)
        env = self.env = await self.pod.environment(self.spec, image)
        self.user = (identity.uid, identity.gid)
        for name in ("root", "upper", "work"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "upper").chmod(0o755)
        files = {"termination-log": "", "passwd": image.passwd}
        for name, text in files.items():
            (folder / name).write_text(text)
        (folder / "termination-log").chmod(0o666)
        words = self.spec.get("command") or image.command
        words = [expand(word, env) for word in [*words, *self.spec.get("args", [])]]
        if not words:
            raise ConfigError(f"no command specified for container {self.name}")
        message = self.spec.get("terminationMessagePath", "/dev/termination-log")
        mounts = [(Path(path), path, True) for path in image.visible]
        mounts.append((folder / "passwd", "/etc/passwd", True))
        mounts += self.pod.mounts(self.spec, env)
        mounts.append((folder / "termination-log", message, False))
        # Outer ones first: a volume at /tmp must not hide an image that lies below /tmp.
        mounts.sort(key=lambda mount: Path(mount[1]).parts)
        spec: Object = {
            "sandbox": self.pod.holder(),
            "state": str(folder / "state"),
            **{name: str(folder / name) for name in ("root", "upper", "work")},
            "mounts": [(str(source), target, readonly) for source, target, readonly in mounts],
            "writable": [target.rstrip("/") for _, target, readonly in mounts if not readonly],
            "folder": self.spec.get("workingDir") or image.folder,
            "home": image.home,
            "command": words,
            "env": env,
            "uid": identity.uid,
            "gid": identity.gid,
            "groups": identity.groups,
            "readonlyRoot": identity.readonly_root,
            "dropCapabilities": identity.drop_capabilities,
            "noNewPrivileges": identity.no_new_privileges,
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        return spec

    def _watchers(self) -> list[asyncio.Task[None]]:
        coroutines = [
            probes.repeat(self, kind, self._became) for kind in probes.KINDS if kind in self.spec
        ]
        limit = self.spec.get("resources", {}).get("limits", {}).get("memory")
        if limit and self.pid:
            coroutines.append(memory.watch(self.pid, quantity.parse(limit), self._out_of_memory))
        return [asyncio.create_task(one) for one in coroutines]

    def _became(self, kind: str, well: bool) -> None:
        if kind == "startupProbe" and well:
            self.started, self.ready = True, "readinessProbe" not in self.spec and not self.init
        elif kind == "readinessProbe":
            self.ready = well
        if not well:
            self.pod.event("Warning", "Unhealthy", f"{kind} failed", self.name)
            if kind != "readinessProbe":
                # Not awaited here: the container's end cancels this very probe.
                self._killing = asyncio.create_task(self.kill(self.pod.grace()))
        self.pod.changed()

    async def _post_start(self, hook: Object) -> None:
        if not await probes.act(self, hook, self.pod.grace()):
            self.pod.event("Warning", "FailedPostStartHook", "PostStartHook failed", self.name)
            await self.kill(self.pod.grace())

    def _out_of_memory(self) -> None:
        self._reason = "OOMKilled"
        self.signal(signal.SIGKILL)

    def _ended(self, code: int, began: str, log: Path, file: Path) -> Object:
        """The terminated state; its message is the file, or the log's end where it may be."""
        message = file.read_text(errors="replace")[-MESSAGE_BYTES:]
        policy = self.spec.get("terminationMessagePolicy")
        if not message and code and policy == "FallbackToLogsOnError":
            text = log.read_text(errors="replace")[-MESSAGE_BYTES // 2 :]
            message = "\n".join(text.splitlines()[-LOG_LINES:])
        ended: Object = {"exitCode": code, "containerID": self._id()}
        ended["reason"] = self._reason or ("Completed" if code == 0 else "Error")
        ended |= {"startedAt": began, "finishedAt": _now()}
        if message:
            ended["message"] = message
        return ended


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
