"""The layout of the repository: what keeps `operator/` harmless and files small."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
STDLIB = pathlib.Path(subprocess.__file__).resolve().parent
PACKAGES = ("serving", "moderation", "operator", "tests")
LONGEST_FILE = 400
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "types", "misc"}


def sources() -> list[pathlib.Path]:
    return sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


# -S skips site-packages: its .pth files import enough of the standard library to hide the shadowing
# on some machines, so it is the only honest probe.
@pytest.mark.parametrize("flags", [[], ["-S"]], ids=["site", "nosite"])
def test_python_started_in_the_repository_finds_the_stdlib_operator(flags: list[str]) -> None:
    probe = "import collections, operator; print(operator.__file__)"
    found = subprocess.run(
        [sys.executable, *flags, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert pathlib.Path(found.stdout.strip()).resolve().parent == STDLIB


def test_the_operator_folder_is_no_regular_package() -> None:
    assert (ROOT / "operator").is_dir()
    assert not (ROOT / "operator" / "__init__.py").exists()


def test_the_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_no_file_is_longer_than_it_can_be_read() -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for file in sources()
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }
    assert long == {}


def test_every_file_is_named_for_what_it_holds() -> None:
    vague = [str(f.relative_to(ROOT)) for f in sources() if f.stem.lower() in VAGUE_NAMES]
    assert vague == []


def test_every_module_says_what_it_is() -> None:
    silent = []
    for file in sources():
        text = file.read_text(encoding="utf-8").lstrip()
        if text and not text.startswith(('"""', 'r"""', "#!")):
            silent.append(str(file.relative_to(ROOT)))
    assert silent == []
