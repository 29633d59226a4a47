"""From a source to a checked set: the report, and the samples that a trainer learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calotype.serving.config.rights import Rights
from calotype.serving.core.errors import DatasetRefused, InvalidRequest
from calotype.serving.training.dataset import verdicts
from calotype.serving.training.dataset.captions import Captioner, CaptionSource, Wording
from calotype.serving.training.dataset.descriptions import Descriptions, describe, is_picture
from calotype.serving.training.dataset.images.buckets import PATCH, Bucket, Placed, fill, place
from calotype.serving.training.dataset.images.duplicates import Seen, look
from calotype.serving.training.dataset.images.pictures import decode, pixels_of
from calotype.serving.training.dataset.report import (
    DatasetReport,
    Duplicate,
    RefusedFile,
    UsedPicture,
)
from calotype.serving.training.dataset.screening import Screen, Screening
from calotype.serving.training.dataset.sources import Limits, Source, changed

Part = Literal["train", "held out", "all"]
SMALLEST_SIDE = 256


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked of a set. Defaults are for FLUX.2 [dev]."""

    resolution: int = 1024
    """Side of a square bucket in pixels, a multiple of 16."""
    wording: Wording = field(default_factory=Wording)
    captioner: Captioner | None = None
    """Writes captions for pictures that have none; None = the fallback or the trigger is used."""
    holdout: float = 0.1
    """Share of pictures that is not learnt from; at least 2 (1 of fewer than 10), 0 = none."""
    distance: int = 31
    """Bits of the PDQ hash in which two copies may differ."""
    rights: Rights | None = None
    """Of pictures that have no record of their own; the set's own ``rights.json`` comes first."""
    rights_required: bool = True
    leave_out_refused: bool = False
    """A picture that the safety stage refuses, or whose rights have expired, is left out; without
    this the whole set is refused."""
    without: frozenset[str] = frozenset()
    """sha256 of files that must not be learnt from: consent that was taken back."""
    limits: Limits = field(default_factory=Limits)
    today: Callable[[], date] = lambda: datetime.now(UTC).date()

    @property
    def min_side(self) -> int:
        return min(SMALLEST_SIDE, self.resolution)


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture as it is learnt."""

    image: NDArray[np.uint8]
    """[3, height, width], RGB."""
    caption: str
    bucket: Bucket
    """(width, height)"""
    sha256: str
    """Of the file as it was given."""
    file: str
    rights: Rights | None
    held_out: bool


class PreparedSet:
    """A checked set. Its source must stay open; files are read again for every sample."""

    def __init__(self, source: Source, report: DatasetReport, options: Options) -> None:
        self.report, self._source, self._options = report, source, options

    def __len__(self) -> int:
        return len(self.report.used)

    def __getitem__(self, index: int) -> Sample:
        """Raises DatasetRefused ``dataset_changed``: the file is not what was checked."""
        used = self.report.used[index]
        limits = self._options.limits
        try:
            data = self._source.read(used.file, limits.file_bytes)
        except DatasetRefused:
            raise changed(used.file) from None
        if hashlib.sha256(data).hexdigest() != used.sha256:
            raise changed(used.file)
        image = decode(data, used.file, limits.pixels, self._options.min_side)
        placed = place(image.width, image.height, self._options.resolution)
        pixels = np.ascontiguousarray(pixels_of(fill(image, placed)).transpose(2, 0, 1))
        return Sample(
            pixels, used.caption, placed.bucket, used.sha256, used.file, used.rights, used.held_out
        )

    def samples(self, part: Part = "train") -> Iterator[Sample]:
        """One after the other, in the order of `report.used`."""
        for index, used in enumerate(self.report.used):
            if part == "all" or used.held_out == (part == "held out"):
                yield self[index]


def prepare(
    source: Source,
    options: Options,
    *,
    screen: Screen,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedSet:
    """Reads, checks and screens every picture of a source; what is wrong is in the report.

    Args:
        screen: the safety stage.
        progress: told after every picture how many are done, and of how many.

    Raises:
        DatasetRefused: nothing of the source can be read: an archive that is a bomb or no archive,
            too many files; or a file changed while it was read.
        ModerationUnavailable: the safety stage could not check a picture.
    """
    if options.resolution % PATCH or options.resolution < 64:
        raise InvalidRequest(
            f"resolution {options.resolution} is no multiple of 16 from 64 on.", param="resolution"
        )
    entries = source.entries()
    said = describe(source, entries, options.limits)
    reading = _Reading(source, options, said, Screening(screen))
    pictures = [entry for entry in entries if is_picture(entry.name) or entry.refused]
    if len(pictures) > options.limits.pictures:
        raise DatasetRefused(
            f"{source.name} has {len(pictures):,} pictures; at most {options.limits.pictures:,} "
            "are learnt from. Leave some out.",
            "dataset_too_large",
            source.name,
        )
    for done, entry in enumerate(pictures, 1):
        if entry.refused is not None:
            reading.refuse(
                DatasetRefused(f"{entry.name} {entry.refused}.", "file_refused", entry.name)
            )
        else:
            reading.take(entry.name)
        if progress is not None:
            progress(done, len(pictures))
    if list(source.entries()) != list(entries):
        raise changed(source.name)
    return PreparedSet(source, reading.report(len(pictures)), options)


@dataclass(slots=True)
class _Reading:
    """What is known while the pictures of a source are read one by one."""

    source: Source
    options: Options
    said: Descriptions
    screening: Screening
    used: list[UsedPicture] = field(default_factory=list)
    refused: list[RefusedFile] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)
    _seen: Seen = field(init=False)

    def __post_init__(self) -> None:
        self._seen = Seen(self.options.distance)
        for fault in self.said.faults:
            self.refuse(fault)

    def refuse(self, fault: DatasetRefused) -> None:
        categories = tuple(fault.details.get("categories", ()))
        self.refused.append(
            RefusedFile(
                fault.param or self.source.name,
                fault.code,
                fault.message,
                fault.details.get("field"),
                categories,
            )
        )

    def take(self, name: str) -> None:
        try:
            self._take(name)
        except DatasetRefused as fault:
            if fault.code == "dataset_changed":
                raise
            self.refuse(fault)

    def _take(self, name: str) -> None:
        limits, options = self.options.limits, self.options
        data = self.source.read(name, limits.file_bytes)
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 in options.without:
            raise DatasetRefused(
                f"{name} may not be learnt from any more: its rights were revoked.",
                "rights_revoked",
                name,
                details={"field": "rights"},
            )
        image = decode(data, name, limits.pixels, options.min_side)
        seen = look(image)
        if (copy := self._seen.copy_of(seen)) is not None:
            self.duplicates.append(Duplicate(name, *copy))
            return
        described = self.said.of(name)
        rights = described.rights or self.said.rights or options.rights
        verdicts.check_rights(rights, name, options.today())

        def automatic() -> str | None:
            return None if options.captioner is None else options.captioner(pixels_of(image))

        worded = options.wording.caption(described.caption, automatic)
        if worded is None:
            raise verdicts.no_caption(name)
        caption, caption_source = worded
        self.screening.check(name, image, caption)
        self._seen.add(name, seen)
        placed = place(image.width, image.height, options.resolution)
        self.used.append(_used(name, sha256, image.size, placed, caption, caption_source, rights))

    def report(self, pictures: int) -> DatasetReport:
        used = verdicts.held_out(self.used, self.options.holdout)
        found = verdicts.Found(
            self.source.name, pictures, used, tuple(self.refused), tuple(self.duplicates)
        )
        return DatasetReport(
            found.source,
            found.pictures,
            found.used,
            found.refused,
            found.duplicates,
            verdicts.problems(
                found,
                leave_out_refused=self.options.leave_out_refused,
                rights_required=self.options.rights_required,
            ),
            verdicts.warnings(found),
            self.options.resolution,
        )


def _used(
    name: str,
    sha256: str,
    size: tuple[int, int],
    placed: Placed,
    caption: str,
    caption_source: CaptionSource,
    rights: Rights | None,
) -> UsedPicture:
    return UsedPicture(
        name,
        sha256,
        *size,
        placed.bucket,
        placed.cropped,
        placed.enlarged,
        caption,
        caption_source,
        held_out=False,
        rights=rights,
    )
