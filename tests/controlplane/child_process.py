"""One child process of the tests: its log, its death with the parent, and its end."""

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def dies_with_parent(sign: int = signal.SIGKILL) -> Callable[[], None]:
    """A `preexec_fn`: an own process group, so that Ctrl-C reaches only the test run, and a signal
    from the kernel when the thread that started the child ends."""

    def prepare() -> None:
        os.setpgid(0, 0)
        _libc.prctl(PR_SET_PDEATHSIG, sign)

    return prepare


class ChildProcess:
    """A running process; `log` holds what it wrote, of all its starts."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | os.PathLike[str]],
        log: Path,
        env: Mapping[str, str] | None = None,
        sign: int = signal.SIGTERM,
    ) -> None:
        self.name, self.log = name, log
        self.command = [os.fspath(word) for word in command]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=None if env is None else {**os.environ, **env},
                preexec_fn=dies_with_parent(sign),
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def check(self) -> None:
        """RuntimeError with the end of its log when the process has ended."""
        if not self.alive:
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}:\n{self.tail()}")

    def tail(self, characters: int = 3000) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def signal(self, sign: int) -> None:
        if self.alive:
            self.process.send_signal(sign)

    def end(self, grace: float = 60.0) -> bool:
        """SIGTERM, then SIGKILL after `grace` seconds; says whether SIGTERM was enough."""
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(grace)
            return True
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return False
