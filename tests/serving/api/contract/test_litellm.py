"""LiteLLM as a client, which names errors by what it reads in their text."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

CALLS = pathlib.Path(__file__).parent / "litellm_calls.py"


@pytest.mark.slow
def test_pictures_edits_and_typed_errors(
    contract: Any,
    python_with: Callable[[str], pathlib.Path],
    outcome: Callable[..., Any],
    tmp_path: pathlib.Path,
) -> None:
    given = tmp_path / "given.png"
    Image.new("RGB", (64, 64), "red").save(given)
    python = python_with("litellm==1.106.2")
    # Without it LiteLLM asks the network for prices when it starts.
    found = outcome(
        [python, CALLS, contract.url, contract.key, given], LITELLM_LOCAL_MODEL_COST_MAP="True"
    )
    assert len(set(found["pictures"])) == 1
    assert found["edit"] not in found["pictures"]
    assert found["usage"] > 0
    assert found["refusals"] == [
        "ContentPolicyViolationError",
        "BadRequestError",
        "AuthenticationError",
        "NotFoundError",
    ]
    drawn = [
        job for job in contract.jobs() if (job.type, job.status) == ("image.generate", "succeeded")
    ]
    asked = [job.request["steps"] for job in drawn]
    assert asked == [3, 3, 3], "unknown names reach the service as they were written"
