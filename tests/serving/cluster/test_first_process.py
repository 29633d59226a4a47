"""A container's process 1 ends when it is told to, also before it serves."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.slow

SPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")


@pytest.fixture
def waiting(tmp_path: pathlib.Path) -> Iterator[subprocess.Popen[bytes]]:
    """`calotype model-app` as process 1 of its namespace, reading a file that nobody writes."""
    if subprocess.run([*SPACE, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no user and process namespaces")
    config = tmp_path / "model.json"
    os.mkfifo(config)
    command = [*SPACE, sys.executable, "-m", "calotype.serving", "model-app"]
    environment = {
        **os.environ,
        "CALOTYPE_INTERNAL_TOKEN": "t" * 32,
        "CALOTYPE_DATABASE_URL": f"sqlite:///{tmp_path}/jobs.sqlite",
        "CALOTYPE_BLOB_URL": f"file://{tmp_path}/blobs",
    }
    process = subprocess.Popen([*command, "--config", str(config)], env=environment)
    yield process
    process.kill()
    process.wait()


def test_the_first_process_of_a_container_ends_on_sigterm_before_it_serves(
    waiting: subprocess.Popen[bytes], tmp_path: pathlib.Path
) -> None:
    patience = time.monotonic() + 600
    while (writer := open_for_writing(tmp_path / "model.json")) is None:
        assert waiting.poll() is None, "it ended before it was told to"
        assert time.monotonic() < patience, "it never came to its file"
        time.sleep(0.05)
    try:
        children = pathlib.Path(f"/proc/{waiting.pid}/task/{waiting.pid}/children")
        os.kill(int(children.read_text()), signal.SIGTERM)
        assert waiting.wait(600) == 128 + signal.SIGTERM
    finally:
        os.close(writer)


def open_for_writing(fifo: pathlib.Path) -> int | None:
    """None as long as nobody reads it."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None
