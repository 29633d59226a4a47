"""What a failed test shows of its cluster: where the logs are, and their ends."""

from collections.abc import Generator
from pathlib import Path

import pytest
from controlplane.client.cluster import OPEN

# Of the processes beside the pods only these are the tests' own.
AGENTS = ("node.log", "kuberay.log")
AGENT_LINES, CONTAINER_LINES, CONTAINERS = 15, 15, 6


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # Also where a fixture failed, which is then no argument of the test.
    if report.failed and item.get_closest_marker("cluster"):
        for folder in sorted(cluster.folder for cluster in OPEN):
            if logs := ends(folder):
                report.sections.append((f"logs of the cluster in {folder}", logs))
    return report


def ends(folder: Path) -> str:
    """The last lines of the agents and of the containers that wrote last."""
    newest = sorted(folder.glob("logs/*.log"), key=lambda log: log.stat().st_mtime)[-CONTAINERS:]
    logs = [(folder / name, AGENT_LINES) for name in AGENTS if (folder / name).exists()]
    logs += [(log, CONTAINER_LINES) for log in newest]
    return "\n".join(
        "\n".join([f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-lines:]])
        for log, lines in logs
    )
