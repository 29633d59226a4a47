"""What a source says of its pictures: ``.txt`` files, ``metadata.jsonl`` and ``rights.json``.

``NAME.txt`` beside ``NAME.png`` is its caption (WebDataset archives have the same names, or
``NAME.json`` with ``text``). A line of ``metadata.jsonl`` is an object with ``file_name`` (relative
to the file's own folder), ``text`` and ``rights``, and wins over ``.txt``. ``rights.json`` at the
top is the rights record of the whole set.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from calotype.serving.config.rights import Rights
from calotype.serving.core.errors import DatasetRefused
from calotype.serving.core.json_object import JsonObject
from calotype.serving.training.dataset.sources import PICTURES, Entry, Limits, Source

LONGEST_CAPTION = 4000
"""Characters: far beyond the 512 tokens that a FLUX.2 encoder reads."""


@dataclass(frozen=True, slots=True)
class Described:
    """What is said of one picture."""

    caption: str | None = None
    rights: Rights | None = None


@dataclass(slots=True)
class Descriptions:
    """What a source says of its pictures, and of the whole set."""

    rights: Rights | None = None
    by_picture: dict[str, Described] = field(default_factory=dict)
    faults: list[DatasetRefused] = field(default_factory=list)
    """Files that cannot be used; each names the file and the field."""

    def of(self, picture: str) -> Described:
        return self.by_picture.get(picture, Described())


def describe(source: Source, entries: Sequence[Entry], limits: Limits) -> Descriptions:
    """Reads every caption and metadata file; a wrong one is a fault, and no end."""
    found = Descriptions()
    readable = {entry.name: entry for entry in entries if entry.refused is None}
    pictures = {name for name in readable if is_picture(name)}
    stems: dict[str, list[str]] = {}
    for name in pictures:
        stems.setdefault(posixpath.splitext(name)[0], []).append(name)
    for name in sorted(readable):
        try:
            _read(source, name, stems, pictures, limits, found)
        except DatasetRefused as fault:
            found.faults.append(fault)
    return found


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)


def parse_rights(given: object, file: str, where: str = "rights") -> Rights:
    """A rights record as JSON has it. Raises DatasetRefused: names file and field."""
    try:
        return Rights.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([where, *(str(part) for part in first["loc"])])
        message = first["msg"].removeprefix("Value error, ")
        raise DatasetRefused(
            f"{file}: {path}: {message}. A record has basis (own, licensed or consent), holder, "
            "licence, evidence and expires.",
            "rights_missing",
            file,
            details={"field": path},
        ) from None


def _read(
    source: Source,
    name: str,
    stems: dict[str, list[str]],
    pictures: set[str],
    limits: Limits,
    found: Descriptions,
) -> None:
    stem, ending = posixpath.splitext(name)
    base = posixpath.basename(name).lower()
    if base == "metadata.jsonl":
        _metadata(_text(_bytes(source, name, limits.metadata_bytes), name), name, pictures, found)
    elif name == "rights.json":
        found.rights = parse_rights(_json(_bytes(source, name, limits.caption_bytes), name), name)
    elif ending.lower() in (".txt", ".caption") and stem in stems:
        caption = _caption(_text(_bytes(source, name, limits.caption_bytes), name), name)
        _add(found, stems[stem], Described(caption))
    elif ending.lower() == ".json" and stem in stems:
        _add(
            found,
            stems[stem],
            _described(_json(_bytes(source, name, limits.caption_bytes), name), name),
        )


def _metadata(text: str, file: str, pictures: set[str], found: Descriptions) -> None:
    folder = posixpath.dirname(file)
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = _json(line.encode(), where)
            picture = row.get("file_name")
            if not isinstance(picture, str):
                raise _wrong(where, "file_name", "is missing; write the picture's path")
            path = posixpath.normpath(posixpath.join(folder, picture))
            if path not in pictures:
                raise _wrong(where, "file_name", f"{picture[:200]!r} names no picture of the set")
            _add(found, [path], _described(row, where), wins=True)
        except DatasetRefused as fault:
            found.faults.append(fault)


def _described(row: JsonObject, where: str) -> Described:
    text, rights = row.get("text", row.get("caption")), row.get("rights")
    if text is not None and not isinstance(text, str):
        raise _wrong(where, "text", "is no text")
    return Described(
        None if text is None else _caption(text, where),
        None if rights is None else parse_rights(rights, where),
    )


def _add(
    found: Descriptions, pictures: Sequence[str], said: Described, *, wins: bool = False
) -> None:
    for picture in pictures:
        old = found.of(picture)
        first, second = (said, old) if wins else (old, said)
        found.by_picture[picture] = replace(
            first,
            caption=second.caption if first.caption is None else first.caption,
            rights=second.rights if first.rights is None else first.rights,
        )


def _caption(text: str, where: str) -> str | None:
    one_line = " ".join(text.split())
    if len(one_line) > LONGEST_CAPTION:
        raise _wrong(
            where, "text", f"has {len(one_line):,} characters; at most {LONGEST_CAPTION:,} are read"
        )
    return one_line or None


def _bytes(source: Source, name: str, most: int) -> bytes:
    try:
        return source.read(name, most)
    except DatasetRefused as fault:
        if fault.code != "file_too_large":
            raise
        raise _wrong(name, "text", f"is in a file of more than {most:,} bytes") from None


def _text(data: bytes, file: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _wrong(file, "text", "is no UTF-8 text; save it as UTF-8") from None


def _json(data: bytes, where: str) -> JsonObject:
    try:
        row = json.loads(_text(data, where))
    except (ValueError, RecursionError) as error:
        raise _wrong(where, "json", f"is no JSON ({str(error)[:100]})") from None
    if not isinstance(row, dict):
        raise _wrong(where, "json", "is no JSON object")
    return row


def _wrong(where: str, field: str, why: str) -> DatasetRefused:
    return DatasetRefused(
        f"{where}: {field} {why}.", "caption_unreadable", where, details={"field": field}
    )
