"""The pictures that an adapter learnt from, in the metadata of its safetensors file.

A trainer writes them, a service reads them when the adapter is first used and notes them in its
database, so that a picture whose consent is taken back is found behind every adapter. Rights of
several pictures are mostly equal, so each record stands once.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.json_object import JsonObject

KEY = "calotype.origins"
"""Of the file's metadata; all values there are strings."""
_LONGEST_HEADER = 32 * 2**20
_MOST_PICTURES = 100_000


@dataclass(frozen=True, slots=True)
class Origins:
    """What an adapter learnt from."""

    dataset_digest: str
    """`DatasetReport.digest`."""
    pictures: tuple[tuple[str, JsonObject | None], ...]
    """The sha256 of each picture's file, and its rights as `config.rights.Rights` writes them."""
    command: str | None = None
    """The command that trained it: with ``--without SHA256`` added it trains it again without."""

    def to_metadata(self) -> dict[str, str]:
        """For ``safetensors.torch.save_file(..., metadata=...)``, beside what else is there."""
        records: list[str] = []
        rows = []
        for sha256, rights in self.pictures:
            record = json.dumps(rights, sort_keys=True)
            if record not in records:
                records.append(record)
            rows.append([sha256, records.index(record)])
        payload = {
            "version": 1,
            "dataset": self.dataset_digest,
            "command": self.command,
            "rights": [json.loads(record) for record in records],
            "pictures": rows,
        }
        return {KEY: json.dumps(payload, separators=(",", ":"))}


def merged(origins: Iterable[Origins | None]) -> Origins | None:
    """Of an adapter that was made of several; None = nothing is known of any of them."""
    known = [one for one in origins if one is not None]
    if not known:
        return None
    found = {sha256: rights for one in known for sha256, rights in one.pictures}
    digests = "\n".join(sorted(one.dataset_digest for one in known))
    digest = hashlib.sha256(digests.encode()).hexdigest()
    return Origins(digest, tuple(sorted(found.items(), key=lambda row: row[0])))


def read_origins(file: pathlib.Path) -> Origins | None:
    """What the file says; None = nothing, or it is no safetensors file.

    Raises:
        InvalidRequest: it says something that cannot be understood.
    """
    text = _metadata(file).get(KEY)
    if text is None:
        return None
    try:
        payload = json.loads(text)
        records, rows = payload["rights"], payload["pictures"]
        if len(rows) > _MOST_PICTURES:
            raise ValueError(f"more than {_MOST_PICTURES} pictures")
        pictures = tuple((_sha256(sha256), records[at]) for sha256, at in rows)
        return Origins(str(payload["dataset"])[:64], pictures, payload.get("command"))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InvalidRequest(
            f"{file}: the metadata {KEY} cannot be read ({error!r}); train the adapter again, or "
            "write it with calotype.",
            param=KEY,
        ) from None


def _metadata(file: pathlib.Path) -> JsonObject:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LONGEST_HEADER:
                return {}
            found = json.loads(stream.read(length)).get("__metadata__")
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _sha256(text: object) -> str:
    if isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text
    raise ValueError(f"{str(text)[:80]!r} is no sha256")
