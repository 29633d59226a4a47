"""What became of every file of a data set: the one result of checking it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from calotype.serving.config.rights import Rights
from calotype.serving.core.errors import DatasetRefused
from calotype.serving.core.json_object import JsonObject
from calotype.serving.engine.sizing.adapter_origins import Origins
from calotype.serving.training.dataset.captions import CaptionSource
from calotype.serving.training.dataset.images.buckets import Bucket


@dataclass(frozen=True, slots=True)
class UsedPicture:
    """A picture that is learnt from."""

    file: str
    sha256: str
    """Of the file as it was given."""
    width: int
    """Upright, before it was cropped."""
    height: int
    bucket: Bucket
    cropped: float
    """Share of its area that is cut off."""
    enlarged: bool
    caption: str
    caption_source: CaptionSource
    held_out: bool
    rights: Rights | None


@dataclass(frozen=True, slots=True)
class RefusedFile:
    """A file that is left out, and why."""

    file: str
    code: str
    """``image_unreadable``, ``image_too_small``, ``content_refused``, ``rights_missing`` ..."""
    reason: str
    field: str | None = None
    """``text``, ``rights.expires`` ...; None = the picture itself."""
    categories: tuple[str, ...] = ()
    """What the safety stage refused it for."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A picture that is left out because another one is nearly the same."""

    file: str
    of: str
    distance: int
    """Bits of the PDQ hash that differ."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the set as a whole cannot be learnt from."""

    code: str
    message: str
    file: str | None = None
    field: str | None = None


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """Every picture that was found is in exactly one of used, refused and duplicates.

    Other files are among the refused only where they cannot be used: captions, metadata.
    """

    source: str
    pictures: int
    """That were found, used or not."""
    used: tuple[UsedPicture, ...]
    refused: tuple[RefusedFile, ...]
    duplicates: tuple[Duplicate, ...]
    problems: tuple[Problem, ...]
    """Empty = it can be learnt from."""
    warnings: tuple[str, ...]
    resolution: int

    @property
    def buckets(self) -> dict[Bucket, int]:
        return dict(sorted(Counter(one.bucket for one in self.used).items()))

    @property
    def captions(self) -> dict[CaptionSource, int]:
        """How many captions are from where."""
        return dict(sorted(Counter(one.caption_source for one in self.used).items()))

    @property
    def held_out(self) -> int:
        return sum(one.held_out for one in self.used)

    @property
    def digest(self) -> str:
        """sha256 of all that is learnt: pictures, captions, buckets, hold-out and rights."""
        rows = [
            [one.sha256, one.caption, one.bucket, one.held_out, _rights(one.rights)]
            for one in sorted(self.used, key=lambda one: one.sha256)
        ]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def origins(self, command: str | None = None) -> Origins:
        """What an adapter that learns from the set writes into its file.

        Args:
            command: that trains it.
        """
        learnt = [one for one in self.used if not one.held_out]
        return Origins(
            self.digest, tuple((one.sha256, _rights(one.rights)) for one in learnt), command
        )

    def raise_for_errors(self) -> None:
        """Raises DatasetRefused: the first problem, with all of them in its details."""
        if self.problems:
            first = self.problems[0]
            rest = len(self.problems) - 1
            more = f" ({rest} more: see the report.)" if rest else ""
            raise DatasetRefused(
                first.message + more,
                first.code,
                first.file or first.field,
                details={"field": first.field, "problems": [_plain(one) for one in self.problems]},
            )

    def to_payload(self) -> JsonObject:
        """The JSON form: of `calotype dataset check --json`, of the API, and of a status."""
        return {
            "source": self.source,
            "ok": not self.problems,
            "digest": self.digest,
            "pictures": self.pictures,
            "resolution": self.resolution,
            "used": [_plain(one) for one in self.used],
            "refused": [_plain(one) for one in self.refused],
            "duplicates": [_plain(one) for one in self.duplicates],
            "buckets": {f"{w}x{h}": count for (w, h), count in self.buckets.items()},
            "captions": {source.value: count for source, count in self.captions.items()},
            "held_out": self.held_out,
            "problems": [_plain(one) for one in self.problems],
            "warnings": list(self.warnings),
        }


def report_from_payload(payload: JsonObject) -> DatasetReport:
    """Rebuilds what `DatasetReport.to_payload` wrote."""
    return DatasetReport(
        payload["source"],
        payload["pictures"],
        tuple(_used(row) for row in payload["used"]),
        tuple(
            RefusedFile(**row | {"categories": tuple(row["categories"])})
            for row in payload["refused"]
        ),
        tuple(Duplicate(**row) for row in payload["duplicates"]),
        tuple(Problem(**row) for row in payload["problems"]),
        tuple(payload["warnings"]),
        payload["resolution"],
    )


def _used(row: JsonObject) -> UsedPicture:
    width, height = row["bucket"]
    given = row["rights"]
    return UsedPicture(
        **row
        | {
            "bucket": (width, height),
            "caption_source": CaptionSource(row["caption_source"]),
            "rights": None if given is None else Rights.model_validate(given),
        }
    )


def _plain(one: UsedPicture | RefusedFile | Duplicate | Problem) -> JsonObject:
    names: Sequence[str] = [field.name for field in dataclasses.fields(one)]
    row = {name: getattr(one, name) for name in names}
    if isinstance(one, UsedPicture):
        row |= {"rights": _rights(one.rights), "cropped": round(one.cropped, 4)}
        row |= {"bucket": list(one.bucket), "caption_source": one.caption_source.value}
    if isinstance(one, RefusedFile):
        row["categories"] = list(one.categories)
    return row


def _rights(rights: Rights | None) -> JsonObject | None:
    return None if rights is None else rights.model_dump(mode="json", exclude_none=True)
