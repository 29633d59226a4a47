"""Fixtures that several folders share."""

import os
import shutil
import tempfile

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests stay on one worker, with what they share: by default those of one file.

    All tests of one cluster do, since each worker would start another one.
    """
    from controlplane.fixtures import SHARED

    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            names = getattr(item, "fixturenames", ())
            cluster = next((name for name in SHARED if name in names), None)
            item.add_marker(pytest.mark.xdist_group(cluster or str(item.path)))


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = config.stash.get(MADE, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ[PROVENANCE_DIR]


pytest_plugins = ["controlplane.fixtures", "controlplane.failure_report"]
