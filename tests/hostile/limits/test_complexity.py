"""What a client sends costs time in proportion to its length, whatever it says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from calotype.moderation.text.views import Lexicon, views
from calotype.serving.api.http.body import parse_object
from calotype.serving.core.errors import InvalidRequest

SHORT, LONG = 2_000, 16_000
MOST_GROWTH = 3.0
"""n log n takes 1.3 times as long per character here; a quadratic reading takes 8 times."""
LEXICON = Lexicon()

TEXTS: dict[str, Callable[[int], str]] = {
    "underscores and letters": lambda n: ("_a" * n)[:n] + "!",
    "letters and spaces": lambda n: ("a " * n)[:n] + "é",
    "letters with two separators": lambda n: ("a.-" * n)[:n] + "bb",
    "one masked word": lambda n: "a" + "*" * n,
    "masked words": lambda n: ("a*b " * n)[:n],
    "one word": lambda n: "a" * n,
    "digits": lambda n: "4" * n,
    "hexadecimal": lambda n: "6e" * (n // 2) + "g",
    "base64": lambda n: "QUFB" * (n // 4) + "!",
    "combining accents": lambda n: "e" + "\u0301" * n,
    "separators": lambda n: "_" * n,
    "one letter and separators": lambda n: "a" + "_" * n + "a",
    "invisible letters": lambda n: "\u200b" * n + "a",
}
BODIES: dict[str, Callable[[int], bytes]] = {
    "a key twice at the end": lambda n: (
        json.dumps({f"k{i}": 0 for i in range(n)}).encode()[:-1] + b', "z": 1, "z": 2}'
    ),
    "backslashes": lambda n: b'{"a": "' + b"\\\\" * n + b'"}',
    "nested lists": lambda n: b"[" * n,
    "nested objects": lambda n: b'{"a":' * n,
    "many numbers": lambda n: json.dumps({"a": list(range(n))}).encode(),
    "escapes": lambda n: b'{"a": "' + b"\\u00e9" * n + b'"}',
}


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of this thread, the least of three: other processes do not count."""
    best = float("inf")
    for _ in range(3):
        begun = time.thread_time()
        call()
        best = min(best, time.thread_time() - begun)
    return best


def growth(run: Callable[[int], object]) -> float:
    """How much longer each character of a long input takes than one of a short input."""
    run(SHORT)
    short = max(seconds(lambda: run(SHORT)), 0.002)
    return seconds(lambda: run(LONG)) / short / (LONG / SHORT)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_prompt_is_read_in_time_that_its_length_explains(text: Callable[[int], str]) -> None:
    assert growth(lambda n: views(text(n), LEXICON)) < MOST_GROWTH


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_body_is_parsed_in_time_that_its_length_explains(body: Callable[[int], bytes]) -> None:
    def parse(n: int) -> None:
        try:
            parse_object(body(n))
        except InvalidRequest:
            pass

    assert growth(parse) < MOST_GROWTH


def test_a_body_of_too_many_values_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(InvalidRequest, match="more than 100,000 values"):
        parse_object(json.dumps({"a": [0] * 200_000}).encode())
