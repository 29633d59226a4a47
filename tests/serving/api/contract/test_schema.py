"""Whatever is sent, fitting the published schema or not, no answer is a fault of ours."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_no_request_makes_a_server_error(contract: Any, tmp_path: pathlib.Path) -> None:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{contract.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {contract.key}"),
            *("--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing"),
            *("--max-examples", "2", "--generation-deterministic"),
            *("--request-timeout", "120", "--continue-on-failure", "--no-color"),
            *("--suppress-health-check", "all"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    sent = re.search(r"(\d+) generated", run.stdout)
    assert sent is not None and int(sent[1]) > 200, run.stdout[-3000:]
    assert contract.http().get("/healthz").status_code == 200
