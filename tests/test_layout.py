"""The layout of the repository: folders that fit a screen, imports that point down, small files."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import house
import pytest

ROOT = house.ROOT
STDLIB = pathlib.Path(subprocess.__file__).resolve().parent
LONGEST_FILE = 400
MOST_ENTRIES, MOST_ROOMS_OF_SERVING = 15, 21
MOST_UNTYPED = 150
"""Places where JSON of others, whose fields we do not know, passes through."""
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "types", "misc"}


def sources(*folders: str) -> list[pathlib.Path]:
    wanted = folders or (*house.PACKAGES, "tests")
    return sorted(file for folder in wanted for file in (ROOT / folder).rglob("*.py"))


def module_name(file: pathlib.Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("calotype", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports(file: pathlib.Path, modules: set[str]) -> Iterator[str]:
    """Our modules that a file imports, wherever in it: functions and TYPE_CHECKING count too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if found := {whole, node.module} & modules:
                    yield max(found, key=len)


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


def test_the_listing_of_every_folder_fits_a_screen() -> None:
    folders = {file.parent for file in sources()}
    long = {
        str(folder.relative_to(ROOT)): len(found)
        for folder in sorted(folders)
        if len(found := house.entries(folder))
        > (MOST_ROOMS_OF_SERVING if folder.name == "serving" else MOST_ENTRIES)
    }
    assert long == {}


def test_no_import_is_part_of_a_circle() -> None:
    files = {module_name(file): file for file in sources(*house.PACKAGES)}
    modules = set(files)
    waiting = {name: set(imports(file, modules)) - {name} for name, file in files.items()}
    while free := {name for name, needs in waiting.items() if not needs}:
        waiting = {name: needs - free for name, needs in waiting.items() if name not in free}
    assert waiting == {}


def test_every_folder_of_rooms_has_layers_for_all_of_them() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    covered = {
        container
        for contract in contracts["contracts"]
        if contract["type"] == "layers" and contract.get("exhaustive")
        for container in contract["containers"]
    }
    with_rooms = {
        module_name(folder.parent / "__init__.py")
        for package in house.PACKAGES
        for folder in house.rooms(package)
        if folder.parent != ROOT
    }
    assert with_rooms - covered == set()


def test_architecture_lists_the_folders_that_there_are() -> None:
    page = house.PAGE.read_text(encoding="utf-8")
    assert house.with_listing(page) == page, "run `python tests/house.py`"


def test_documents_name_files_that_there_are() -> None:
    path = re.compile(r"`((?:serving|moderation|operator|helm|tests|docs|examples)/[\w./-]+)`")
    gone = {
        (page.name, named)
        for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
        if page.name != "CHANGELOG.md"
        for named in path.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / named).exists()
    }
    assert gone == set()


def test_processes_speak_in_typed_words() -> None:
    untyped = re.compile(r"\b(?:dict|Mapping|MutableMapping)\[str, Any\]")
    found = {
        str(file.relative_to(ROOT)): len(untyped.findall(file.read_text(encoding="utf-8")))
        for file in sources(*house.PACKAGES)
    }
    assert sum(found.values()) <= MOST_UNTYPED, {f: n for f, n in found.items() if n > 2}


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
