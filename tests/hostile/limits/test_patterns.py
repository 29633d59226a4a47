"""Every regular expression of the packages, found by reading them, is fed what makes it go back."""

from __future__ import annotations

import ast
import importlib
import itertools
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[3]
PACKAGES = ("serving", "moderation", "operator")
CALLS = ("search", "match", "fullmatch", "sub", "split", "findall", "finditer", "subn")
SMALL, LARGE = (12, 16, 20, 24, 28), (256, 1024, 4096)
SLOW = 0.02
"""Seconds of CPU in which a pattern reads far more than a short text."""
MOST_GROWTH = 10.0
"""Of a text four times as long: n log n takes 5 times as long, a quadratic reading 16 times."""


@dataclass(frozen=True)
class Found:
    """A pattern, and how its module applies it."""

    where: str
    pattern: re.Pattern[Any]
    calls: frozenset[str]


def found_patterns() -> Iterator[Found]:
    for path in sorted(itertools.chain(*((ROOT / name).rglob("*.py") for name in PACKAGES))):
        source = path.read_text()
        if "import re\n" in source:
            yield from patterns_of(path, source)


def patterns_of(path: pathlib.Path, source: str) -> Iterator[Found]:
    """Literal patterns from the text; where one is put together, the module's own."""
    where, computed = str(path.relative_to(ROOT)), False
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "re"):
            continue
        call = node.func.attr
        if call not in (*CALLS, "compile"):
            continue
        try:
            text = ast.literal_eval(node.args[0])
        except ValueError:
            computed = True
            continue
        line = source.splitlines()[node.lineno - 1]
        calls = uses(line.split(" ")[0].rstrip(":"), source) if call == "compile" else {call}
        flags = [ast.unparse(flag) for flag in node.args[1 if call == "compile" else 9 :]]
        made = re.compile(text, eval(flags[0], {"re": re}) if flags else 0)
        yield Found(f"{where}:{node.lineno}", made, frozenset(calls))
    if computed:
        module = importlib.import_module("calotype." + where.removesuffix(".py").replace("/", "."))
        for name, value in vars(module).items():
            for pattern in patterns_in(value):
                yield Found(f"{where}:{name}", pattern, frozenset(uses(name, source)))


def uses(name: str, source: str) -> set[str]:
    """How a module applies the pattern of that name; of a pattern in a list, all that it does."""
    own = set(re.findall(rf"\b{re.escape(name)}\.([a-z]+)\(", source)) & set(CALLS)
    return own or (set(re.findall(r"(?<!re)\.([a-z]+)\(", source)) & set(CALLS))


def patterns_in(value: Any) -> Iterator[re.Pattern[Any]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from patterns_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from patterns_in(item)


PATTERNS = list(found_patterns())


def letters_of(pattern: str) -> list[str]:
    """Some that the pattern looks for, and some of every kind."""
    own = [
        char for char in dict.fromkeys(re.sub(r"\\.", "", pattern)) if char not in "()[]{}|?*+^$"
    ]
    return list(dict.fromkeys([*own[:3], "a", "0", " ", "_"]))[:6]


def attacks(pattern: str) -> Iterator[Callable[[int], str]]:
    for first, second in itertools.combinations_with_replacement(letters_of(pattern), 2):
        yield lambda n, first=first, second=second: ((first + second) * n)[:n] + "\n\0"


def seconds(found: Found, text: str) -> float:
    binary = isinstance(found.pattern.pattern, bytes)
    given: Any = text.encode() if binary else text
    begun = time.thread_time()
    for call in found.calls & {"search", "match", "fullmatch"}:
        getattr(found.pattern, call)(given)
    if found.calls & {"sub", "subn", "split", "findall", "finditer"}:
        found.pattern.search(given)
    return time.thread_time() - begun


@pytest.mark.parametrize("found", PATTERNS, ids=lambda found: found.where)
def test_a_pattern_reads_in_time_that_the_length_explains(found: Found) -> None:
    pattern = found.pattern.pattern
    text = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    for attack in attacks(text):
        for length in SMALL:
            assert seconds(found, attack(length)) < SLOW, f"{text!r} and {attack(length)!r}"
        times = [min(seconds(found, attack(length)) for _ in range(2)) for length in LARGE]
        if times[2] > SLOW / 10:
            assert times[2] / max(times[1], 1e-5) < MOST_GROWTH, f"{text!r} and {attack(20)!r}"


def test_the_patterns_are_found() -> None:
    assert len(PATTERNS) > 30
    evil = Found("here", re.compile(r"(a+)+$"), frozenset({"match"}))
    with pytest.raises(AssertionError):
        test_a_pattern_reads_in_time_that_the_length_explains(evil)
