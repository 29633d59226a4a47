"""Reads JSON bodies so that no bytes of a client can become a 500."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request

from calotype.serving.api.state.gateway import gateway_of
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject

PARSED_AT_ONCE = 64 * 1024
"""Bytes of a body that are parsed on the event loop; a longer one would delay other requests."""
_MOST_VALUES = 100_000
"""Python builds an object for each: a second and 100 MB for a million of them. Commas count."""
_DEEPEST = 100
"""Levels of lists and objects in each other."""
SMALL_BODY = 1024 * 1024
"""Bytes of a body that holds no pictures."""
_JSON_COPIES = 3.5
"""The bytes, their text and its values; then the values, their text again and a digest's bytes."""
_SMALL_BYTES = 1024 * 1024
"""What is taken without asking."""


def json_body(schema: type[BaseModel]) -> dict[str, object]:
    """OpenAPI's description of a body that `read_json` reads."""
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema.model_json_schema()}},
        }
    }


async def read_json(request: Request, max_bytes: int, seconds: float = 60.0) -> JsonObject:
    """The request's JSON object.

    Args:
        seconds: within which all of it must arrive.

    Raises:
        InvalidRequest: too slow (``request_timeout``), too long (``body_too_large``), not JSON,
            not an object, a key twice, NaN, nested too deeply, or text that is no Unicode.
    """
    _check_content_type(request)
    raw = await read_body(request, max_bytes, seconds)
    if len(raw) <= PARSED_AT_ONCE:
        return parse_object(raw)
    return await asyncio.to_thread(parse_object, raw)


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytearray:
    """The bytes of a body. Raises like `read_json`."""
    raw = bytearray()
    async for chunk in limited_stream(request, max_bytes, seconds):
        raw += chunk
    return raw


def parse_object(raw: bytes | bytearray) -> JsonObject:
    """`read_json` for bytes."""
    if sum(map(raw.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise InvalidRequest(
            f"The body has more than {_MOST_VALUES:,} values; send large data as base64 or as a "
            "file of /v1/files.",
            code="invalid_json",
        )
    try:
        body = json.loads(
            raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_twins
        )
        _check_values(body)
    except InvalidRequest:
        raise
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.", code="invalid_json") from None
    except UnicodeError:
        raise InvalidRequest("The body is not valid UTF-8 text.", code="invalid_json") from None
    except ValueError as error:
        raise InvalidRequest(
            f"We could not parse the JSON body of your request: {error}.", code="invalid_json"
        ) from None
    if not isinstance(body, dict):
        raise InvalidRequest(
            f"The body must be a JSON object, not {type(body).__name__}.", code="invalid_json"
        )
    return body


def _check_content_type(request: Request) -> None:
    given = request.headers.getlist("content-type")
    if len(given) > 1:
        raise InvalidRequest("The request has more than one Content-Type header.")
    kind = given[0].split(";")[0].strip().lower() if given else "application/json"
    if kind != "application/json" and not kind.endswith("+json"):
        raise InvalidRequest(
            f"Content-Type must be application/json, got {kind[:80]!r}.",
            code="unsupported_content_type",
        )


@contextlib.asynccontextmanager
async def room_for_body(
    request: Request, team_id: str, max_bytes: int, copies: float = _JSON_COPIES
) -> AsyncIterator[None]:
    """Waits until there is memory for the request's body and for what is made of it.

    Args:
        copies: how often the bytes are in memory at once, at most.

    Raises:
        Overloaded: there was none in time.
    """
    announced = request.headers.get("content-length", "")
    known = announced.isascii() and announced.isdigit()
    size = int(min(max_bytes, int(announced[:20]) if known else max_bytes) * copies)
    if size <= _SMALL_BYTES:
        yield
        return
    async with gateway_of(request).memory.bodies.reserve(team_id, size):
        yield


async def limited_stream(
    request: Request, max_bytes: int, seconds: float
) -> AsyncGenerator[bytes, None]:
    """The parts of a body, not more and not longer than this. Raises like `read_json`."""
    too_large = InvalidRequest(
        f"The body may have at most {max_bytes:,} bytes.", code="body_too_large"
    )
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > max_bytes:
        raise too_large
    clock = asyncio.get_running_loop().time
    end, seen = clock() + seconds, 0
    parts = request.stream().__aiter__()
    while True:
        try:
            async with asyncio.timeout_at(end):
                chunk = await anext(parts)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise InvalidRequest(
                f"The body did not arrive within {seconds:g} s.", code="request_timeout"
            ) from None
        seen += len(chunk)
        if seen > max_bytes:
            raise too_large
        yield chunk


def _check_values(body: Any) -> None:
    """Raises InvalidRequest for what the parser lets pass, UnicodeError for lone surrogates."""
    level, depth = [body], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise InvalidRequest("The body is nested too deeply.", code="invalid_json")
        inside: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inside += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                inside += value
            elif isinstance(value, str):
                if "\0" in value:
                    raise InvalidRequest("The body contains a NUL character.", code="invalid_json")
                if not value.isascii():
                    value.encode("utf-8")
        level = inside


def _no_constant(name: str) -> Any:
    raise InvalidRequest(f"The body contains {name}, which is not JSON.", code="invalid_json")


def _no_twins(pairs: list[tuple[str, Any]]) -> JsonObject:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twin = next(name for name, count in counts.items() if count > 1)
        raise InvalidRequest(
            f"The body names {twin[:80]!r} twice.", code="invalid_json", param=twin[:80]
        )
    return found
