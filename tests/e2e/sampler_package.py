"""A package as a team would install it, with the sampler that docs/engine.md shows."""

from __future__ import annotations

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "acme-samplers"
version = "1.0"

[project.entry-points."calotype.samplers"]
"acme.straight" = "acme_samplers:build"
"""


def install(project: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the package into one empty folder, and lets pip install it into another."""
    text = (ROOT / "docs" / "engine.md").read_text()
    # The class of the documentation itself, so that it is no other one that is tried.
    shown = "class Straight:" + text.partition("class Straight:")[2].partition("```")[0]
    (project / "pyproject.toml").write_text(PROJECT)
    (project / "acme_samplers").mkdir()
    (project / "acme_samplers" / "__init__.py").write_text(shown)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
            *("--no-build-isolation", "--disable-pip-version-check"),
            *("--target", str(target), str(project)),
        ],
        check=True,
    )
