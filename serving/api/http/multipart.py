"""Reads multipart bodies, as SDKs send them: strings for everything, files in several spellings.

Fields stay strings; `schemas.parse` with ``form=True`` reads them as what the schema wants.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from calotype.serving.api.http.body import PARSED_AT_ONCE, limited_stream, parse_object
from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject

MAX_FILES = 20
MAX_FIELDS = 200
MAX_FIELD_BYTES = 256 * 1024
FORM_COPIES = 2.0
"""How often a form's bytes are in memory: as they come, and on their way to the store."""
_FILE = re.compile(r"(images?|mask)(\[\d{0,2}\])?")
"""How clients call the files of an edit."""
_INDEXED = re.compile(r"([a-z_]+)\[(\d{1,2})\]\[([a-z_]+)\]")
_COLUMN = re.compile(r"([a-z_]+)\[\](\[[a-z_]+\])?")
_MEMBER = re.compile(r"(expand|metadata)\[([^\[\]]{1,64})\]")
"""How OpenAI's SDKs write objects into a form."""
_JSON_FIELDS = (
    "loras",
    "image_loras",
    "metadata",
    "sigmas",
    "reference_images",
    "controlnets",
    "recipe",
    "expand",
    "rights",
)


@dataclass(frozen=True, slots=True)
class FormFile:
    name: str
    filename: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Form:
    """A multipart body."""

    fields: JsonObject
    files: list[FormFile]

    def images(self) -> list[FormFile]:
        """The parts ``image``, ``image[]`` and ``image[0]``, in order; also with ``images``."""
        return [file for file in self.files if _plain_name(file.name) == "image"]

    def file(self, name: str) -> FormFile | None:
        """The one part of that name; of a mask also ``mask[]`` and ``mask[0]``.

        Raises:
            InvalidRequest: there are several.
        """
        found = [part for part in self.files if _plain_name(part.name) == name]
        if len(found) > 1:
            raise InvalidRequest(f"There is more than one part '{name}'.", param=name)
        return found[0] if found else None

    def all_files(self, name: str) -> list[FormFile]:
        """The parts of that name, also written ``name[]``, in order."""
        return [part for part in self.files if part.name in (name, f"{name}[]")]

    def check_files(self, known: Collection[str]) -> None:
        """Raises InvalidRequest for a file of another name: it would be ignored silently."""
        for file in self.files:
            if _plain_name(file.name) not in known:
                raise InvalidRequest(
                    f"Unknown file: '{file.name}'. Files may be called {' and '.join(known)}.",
                    code="unknown_parameter",
                    param=file.name,
                )


def _plain_name(name: str) -> str:
    found = _FILE.fullmatch(name)
    return found[1].removesuffix("s") if found else name


async def read_form(request: Request, max_bytes: int, seconds: float) -> Form:
    """The parts of a multipart body.

    Raises:
        InvalidRequest: too large or too slow, broken, or too many parts.
    """
    parser = MultiPartParser(
        request.headers,
        limited_stream(request, max_bytes, seconds),
        max_files=MAX_FILES,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, MultipartParseError, KeyError, UnicodeError, ValueError) as error:
        reason = getattr(error, "message", "") or str(error) or "it is broken"
        raise InvalidRequest(
            f"We could not parse the multipart body of your request: {reason}",
            code="invalid_multipart",
        ) from None
    try:
        plain: list[tuple[str, str]] = []
        files: list[FormFile] = []
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.append(FormFile(name[:80], (value.filename or "")[:255], await value.read()))
            else:
                plain.append((name, value))
    finally:
        await form.close()
    if sum(len(value) for _, value in plain) <= PARSED_AT_ONCE:
        return Form(_gather(plain), files)
    return Form(await asyncio.to_thread(_gather, plain), files)


def is_multipart(request: Request) -> bool:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    return kind == "multipart/form-data"


def _gather(plain: list[tuple[str, str]]) -> JsonObject:
    """Fields by name: JSON where it is documented, ``loras[0][id]`` joined, columns refused."""
    found: JsonObject = {}
    rows: dict[str, dict[int, JsonObject]] = {}
    objects: dict[str, JsonObject] = {}
    for name, value in plain:
        if _FILE.fullmatch(name) and not value.isprintable():
            raise InvalidRequest(
                f"The part '{name}' has no filename, so that it is no file; give it one, as "
                f"`curl -F {name}=@picture.png` does.",
                code="invalid_multipart",
                param=name,
            )
        if "\0" in name or "\0" in value:
            raise InvalidRequest("The body contains a NUL character.", code="invalid_multipart")
        indexed, column = _INDEXED.fullmatch(name), _COLUMN.fullmatch(name)
        member = _MEMBER.fullmatch(name)
        if member is not None:
            _add_member(objects.setdefault(member[1], {}), member[1], member[2], value)
        elif indexed is not None:
            row = rows.setdefault(indexed[1], {}).setdefault(int(indexed[2]), {})
            row[indexed[3]] = value
        elif column is not None:
            raise InvalidRequest(
                f"'{name[:80]}' does not say which values belong together. Send {column[1]} as "
                f'one field that holds JSON, for example {column[1]}=[{{"id": "...", '
                '"scale": 0.8}].',
                param=column[1],
            )
        elif name in found:
            raise InvalidRequest(f"The body names '{name[:80]}' twice.", param=name[:80])
        else:
            found[name] = _parsed(name, value) if name in _JSON_FIELDS else value
    joined: JsonObject = {n: [row[index] for index in sorted(row)] for n, row in rows.items()}
    for name, whole in (joined | objects).items():
        if name in found:
            raise InvalidRequest(f"The body names '{name}' twice.", param=name)
        found[name] = whole
    return found


def _add_member(target: JsonObject, name: str, member: str, value: str) -> None:
    if member in target:
        raise InvalidRequest(f"The body names '{name}[{member}]' twice.", param=name)
    target[member] = value


def _parsed(name: str, text: str) -> Any:
    try:
        # Through the same parser as JSON bodies: no NaN, no names twice, not too deep.
        return parse_object(b'{"value":' + text.encode("utf-8", "surrogatepass") + b"}")["value"]
    except InvalidRequest as error:
        raise InvalidRequest(
            f"{name} must be JSON: {error.message}", code="invalid_value", param=name
        ) from None
    except (json.JSONDecodeError, KeyError):
        raise InvalidRequest(f"{name} must be JSON.", param=name) from None
