"""The two files of pinned versions say the same, and the one with hashes has them all."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def pins(text: str) -> set[str]:
    """``name==version`` with its markers, of each package."""
    joined = text.replace("\\\n", " ")
    lines = (re.sub(r"\s*--hash=\S+", "", line).strip() for line in joined.splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def test_the_lock_has_the_versions_of_the_constraints() -> None:
    constraints = pins((ROOT / "constraints.txt").read_text())
    lock = pins((ROOT / "requirements.lock").read_text())
    assert lock == constraints, "run `make constraints`"


def test_every_pinned_file_has_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    packages = [line for line in text.splitlines() if "==" in line]
    assert len(packages) > 100
    assert [line[:60] for line in packages if "--hash=sha256:" not in line] == []
