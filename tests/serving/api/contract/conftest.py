"""Clients that nobody changed: installed once, into a cache beside the clone, from the registries.

Only the service's address and key are theirs to know.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from calotype.serving.images.provenance import MARKS, installation_marks

FOLDER = pathlib.Path(__file__).parent
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
CLIENTS = CACHE / "calotype" / "clients"
UNREACHABLE = ("EAI_AGAIN", "ENOTFOUND", "ECONNREFUSED", "dns error", "Connection refused")
"""How npm and uv say that there is no network."""


@pytest.fixture(scope="module")
def contract(
    tmp_path_factory: pytest.TempPathFactory, shared_running: Callable[..., Any]
) -> Iterator[Any]:
    # Clients compare whole files by their digest: without Content Credentials their bytes repeat.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARKS, "xmp,watermark")
        installation_marks.cache_clear()
        with shared_running(tmp_path_factory.mktemp("contract")) as service:
            yield service
    installation_marks.cache_clear()


@pytest.fixture(scope="session")
def python_with() -> Callable[[str], pathlib.Path]:
    """A Python that has one package, such as ``openai==2.0.0``, and what it needs."""
    return _python_with


@pytest.fixture(scope="session")
def node_with() -> Callable[[str], pathlib.Path]:
    """A folder whose ``node_modules`` have one package, such as ``openai@7.57.0``."""
    return _node_with


@pytest.fixture(scope="session")
def outcome() -> Callable[..., Any]:
    """What a child program printed as JSON: ``outcome([python, "calls.py", url, key])``."""
    return _outcome


def _python_with(package: str) -> pathlib.Path:
    folder = CLIENTS / package.replace("==", "-")
    python = folder / "bin" / "python"
    uv = (sys.executable, "-m", "uv")

    def install(place: pathlib.Path) -> None:
        _run(*uv, "venv", "--quiet", "--python", sys.executable, str(place))
        _run(*uv, "pip", "install", "--quiet", "--python", str(place / "bin" / "python"), package)

    _install(folder, install)
    return python


def _node_with(package: str) -> pathlib.Path:
    if shutil.which("npm") is None:
        pytest.skip("Node is not installed (Debian: apt-get install nodejs npm)")
    folder = CLIENTS / package.replace("@", "-")

    def install(place: pathlib.Path) -> None:
        place.mkdir()
        (place / "package.json").write_text('{"private": true, "type": "module"}')
        _run("npm", "install", "--silent", "--no-audit", "--no-fund", package, folder=place)

    _install(folder, install)
    return folder


def _install(folder: pathlib.Path, install: Callable[[pathlib.Path], None]) -> None:
    done = folder / ".installed"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Other processes of this run, and other clones, share the cache.
    with open(f"{folder}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        install(folder)
        done.touch()


def _run(*command: str, folder: pathlib.Path = FOLDER) -> None:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    if run.returncode != 0 and any(sign in run.stderr for sign in UNREACHABLE):
        pytest.skip(f"the package registry cannot be reached: {run.stderr.strip()[-200:]}")
    assert run.returncode == 0, run.stderr


def _outcome(command: list[Any], **environment: str) -> Any:
    run = subprocess.run(
        [str(word) for word in command],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.strip().splitlines()[-1])
