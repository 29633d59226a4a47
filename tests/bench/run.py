"""``make bench``: runs every bench, writes out/bench.json and the tables of BENCHMARKS.md."""

from __future__ import annotations

import sys

# Python looks beside a script first, and would find the bench operator.py in place of the standard
# library's module. (With python -P this is the archive of a library that is none.)
sys.path.pop(0)

import importlib.util
import json
import pathlib
import platform
from typing import Any

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parents[1]
BENCHES = ("engine", "engine_cache", "training", "service", "gateway", "operator", "moderation")
BEGIN, END = "<!-- begin: written by make bench -->", "<!-- end -->"


def main() -> int:
    wanted = sys.argv[1:] or BENCHES
    out = ROOT / "out" / "bench.json"
    out.parent.mkdir(exist_ok=True)
    # A whole run starts anew, so that no row of a measure stays that is not made any more.
    known = sys.argv[1:] and out.exists()
    results: dict[str, dict[str, Any]] = json.loads(out.read_text()) if known else {}
    for name in wanted:
        found = load(name).measure()
        print_table(name, found)
        results.update(found)
    out.write_text(json.dumps(results, indent=2) + "\n")
    write_page(results)
    missed = [name for name, result in results.items() if not meets(result)]
    for name in missed:
        print(f"below its bar: {name}", file=sys.stderr)
    return 1 if missed else 0


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"there is no bench {name!r}; there are: {', '.join(BENCHES)}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def meets(result: dict[str, Any]) -> bool:
    if result["bar"] is None:
        return True
    if result["better"] == "lower":
        return bool(result["value"] <= result["bar"])
    return bool(result["value"] >= result["bar"])


def row(name: str, result: dict[str, Any]) -> str:
    sign = "<=" if result["better"] == "lower" else ">="
    bar = "-" if result["bar"] is None else f"{sign} {result['bar']} {result['unit']}"
    return f"| {name} | {result['value']} {result['unit']} | {bar} |"


def print_table(title: str, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}")
    for name, result in results.items():
        print(row(name, result))


def write_page(results: dict[str, dict[str, Any]]) -> None:
    page = ROOT / "BENCHMARKS.md"
    text = page.read_text()
    table = "\n".join(
        [
            BEGIN,
            f"{cpu()}, Python {platform.python_version()}",
            "",
            "| measure | value | bar |",
            "|---|---|---|",
            *(row(name, result) for name, result in results.items()),
            END,
        ]
    )
    before, rest = text.split(BEGIN)
    page.write_text(before + table + rest.split(END)[1])


def cpu() -> str:
    """The processor's name and how many of its cores there are."""
    import os

    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
