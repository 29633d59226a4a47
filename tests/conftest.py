"""Fixtures that several folders share."""

import gc
import os
import shutil
import tempfile
from collections.abc import Generator

import pytest

PROVENANCE_DIR = "CALOTYPE_PROVENANCE_DIR"
MADE = pytest.StashKey[str]()

# Tests run side by side (`make test`): a pool of threads in each of them would only take turns.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """One folder of keys for the whole run: every process that a test starts marks alike."""
    if PROVENANCE_DIR not in os.environ:
        os.environ[PROVENANCE_DIR] = tempfile.mkdtemp(prefix="calotype-marks-")
        config.stash[MADE] = os.environ[PROVENANCE_DIR]


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash.get(MADE, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ[PROVENANCE_DIR]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Garbage collection takes a third of the time in which thousands of modules are imported; what
    is imported then stays until the end, and no later collection has to look at it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


pytest_plugins = ["controlplane.fixtures", "controlplane.failure_report", "servers.side_by_side"]
