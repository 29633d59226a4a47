"""The folders of the packages with what they say they are: the listing in ARCHITECTURE.md.

`python tests/house.py` writes it there; a test says when it is out of date.
"""

from __future__ import annotations

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("serving", "moderation", "operator")
PAGE = ROOT / "ARCHITECTURE.md"
BEGIN, END = "<!-- begin: written by tests/house.py -->", "<!-- end -->"
_UNNAMED = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
_WIDTH = 24


def entries(folder: pathlib.Path) -> list[str]:
    """What a listing of the folder shows, without what every package has."""
    return sorted(e.name for e in folder.iterdir() if e.name not in _UNNAMED)


def rooms(package: str) -> list[pathlib.Path]:
    """The package's folders with modules, by name; Alembic's scripts are none."""
    folders = {
        file.parent
        for file in (ROOT / package).rglob("*.py")
        if "migrations" not in file.relative_to(ROOT).parts
    }
    return sorted(folders, key=lambda folder: folder.relative_to(ROOT).parts)


def first_line(module: pathlib.Path) -> str:
    doc = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0]


def listing() -> str:
    lines = [BEGIN, "```"]
    for package in PACKAGES:
        for folder in rooms(package):
            parts = folder.relative_to(ROOT).parts
            name = "  " * (len(parts) - 1) + parts[-1] + "/"
            init = folder / "__init__.py"
            says = first_line(init) if init.exists() else ""
            lines.append(f"{name:{_WIDTH}} {says}".rstrip())
    return "\n".join([*lines, "```", END])


def with_listing(page: str) -> str:
    before, rest = page.split(BEGIN)
    return before + listing() + rest.split(END, 1)[1]


if __name__ == "__main__":
    PAGE.write_text(with_listing(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
