"""What a client sends costs time in proportion to its length, whatever it says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hostile.limits.growth import MOST_GROWTH, growth, seconds
from starlette.requests import Request

from calotype.moderation.text.views import Lexicon, views
from calotype.serving.api.generation.recipes import expand_recipe
from calotype.serving.api.http.body import parse_object
from calotype.serving.api.http.multipart import read_form
from calotype.serving.api.http.schemas import parse_generation
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject
from calotype.serving.jobs.recipe import MOST_CHANGES, changes

LEXICON = Lexicon()
HEAD = b'\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
END = b"\r\n--b--\r\n"

TEXTS: dict[str, Callable[[int], str]] = {
    "underscores and letters": lambda n: ("_a" * n)[:n] + "!",
    "underscores before a word": lambda n: "_" * n + "aa",
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
FORMS: dict[str, Callable[[int], bytes]] = {
    "fields": lambda n: b"".join(b"--b" + HEAD % b"f%d" % i + b"x\r\n" for i in range(n)) + END,
    "files": lambda n: (FILE + b"x\r\n") * n + END,
    "boundaries that are none": lambda n: FILE + b"\r\n--bX" * n + END,
    "beginnings of boundaries": lambda n: FILE + b"\r\n--" * n + END,
    "line ends": lambda n: FILE + b"\r" * n + END,
    "headers": lambda n: b"--b\r\n" + b"a: b\r\n" * n + END,
    "a long header": lambda n: b"--b" + HEAD % (b"a" * n) + b"x" + END,
    "a header of backslashes": lambda n: b"--b" + HEAD % (b'\\"' * n) + b"x" + END,
    "parameters of a header": lambda n: (
        b"--b\r\nContent-Disposition: form-data" + b"; a=b" * n + END
    ),
    "nothing": lambda n: b"\r\n" * n,
    "more behind its end": lambda n: b"--b" + HEAD % b"a" + b"x" + END + b"\r\n--b" * n,
    "json in a field": lambda n: b"--b" + HEAD % b"recipe" + b'{"a":' * n + END,
}
PARAMETERS: dict[str, Callable[[int], JsonObject]] = {
    "unknown names": lambda n: {f"k{i}": 0 for i in range(n)},
    "a long name": lambda n: {"k" * n * 10: 0},
    "adapters": lambda n: {"prompt": "x", "loras": [{"id": 1}] * n},
    "unknown names of adapters": lambda n: {
        "prompt": "x",
        "loras": [{f"k{i}": 0 for i in range(n)}],
    },
    "noise levels": lambda n: {"prompt": "x", "sigmas": ["a"] * n},
    "metadata": lambda n: {"prompt": "x", "metadata": {f"k{i}": 1 for i in range(n)}},
    "margins": lambda n: {"prompt": "x", "expand": {f"k{i}": 1 for i in range(n)}},
    "references": lambda n: {"prompt": "x", "reference_images": [{"a": 1}] * n},
    "adapters of a recipe": lambda n: {"recipe": recipe(adapters=[{}] * n)},
}
RECIPES: dict[str, Callable[[int], JsonObject]] = {
    "long names above many": lambda n: {"model": {"k" * n * 4: {f"{i}": 0 for i in range(n)}}},
    "many in each other": lambda n: {"model": nested({f"{i}": 0 for i in range(n)}, 90)},
    "long names in each other": lambda n: {"model": nested(0, 90, "k" * (n // 9))},
    "lists": lambda n: {"sigmas": [[[i]] for i in range(n)]},
}


def recipe(**more: Any) -> JsonObject:
    return {"version": 1, "model": {}, "output": {}, "prompt": "x", **more}


def nested(inner: Any, levels: int, name: str = "k") -> Any:
    for _ in range(levels):
        inner = {name: inner}
    return inner


def read(body: bytes) -> None:
    """A form, as it comes in pieces of 64 KiB."""
    pieces = [body[start : start + 65_536] for start in range(0, len(body), 65_536)]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    headers = [(b"content-type", b"multipart/form-data; boundary=b")]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    try:
        asyncio.run(read_form(request, len(body), 600))
    except InvalidRequest:
        pass


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


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_form_is_read_in_time_that_its_length_explains(form: Callable[[int], bytes]) -> None:
    assert growth(lambda n: read(form(n))) < MOST_GROWTH


@pytest.mark.parametrize("body", PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_are_checked_in_time_that_their_number_explains(
    body: Callable[[int], JsonObject],
) -> None:
    def check(n: int) -> None:
        with pytest.raises(InvalidRequest) as refused:
            parse_generation(expand_recipe(body(n))[0])
        assert len(refused.value.message) < 500

    assert growth(check) < MOST_GROWTH


def test_the_faults_of_a_body_are_not_all_put_into_words() -> None:
    names: JsonObject = {f"k{i}": 0 for i in range(90_000)}
    parsing = seconds(lambda: parse_object(json.dumps(names).encode()))
    for body in (names, {"prompt": "x", "expand": names}, {"prompt": "x", "metadata": names}):
        assert seconds(lambda body=body: refused(body)) < parsing


def refused(body: JsonObject) -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        parse_generation(body)


@pytest.mark.parametrize("given", RECIPES.values(), ids=RECIPES)
def test_what_is_not_as_a_recipe_says_is_told_in_a_bounded_answer(
    given: Callable[[int], JsonObject],
) -> None:
    def compare(n: int) -> None:
        found = changes(given(n), recipe())
        assert len(found) <= MOST_CHANGES and all(len(c["field"]) < 300 for c in found)

    assert growth(compare) < MOST_GROWTH
