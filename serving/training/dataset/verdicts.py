"""When a picture, and when a whole set, may not be learnt from. Pure decisions.

Single pictures that cannot be read are left out, up to `MOST_UNREADABLE`. What somebody must
look at (a picture that the safety stage refused, missing rights or captions) stops the whole set.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from calotype.serving.config.rights import Rights
from calotype.serving.core.errors import DatasetRefused
from calotype.serving.training.dataset.captions import CaptionSource
from calotype.serving.training.dataset.report import Duplicate, Problem, RefusedFile, UsedPicture

FEWEST, ADVISED = 5, 15
MOST_DUPLICATES = 0.3
MOST_UNREADABLE = 0.05
MUCH_CROPPED = 0.3
UNREADABLE = ("image_unreadable", "file_too_large")
LEFT_OUT = ("content_refused", "rights_expired")
"""Codes that stop the set unless it was asked to leave such pictures out."""
STOPPING = ("rights_missing", "caption_missing", "caption_unreadable")
"""Codes that always stop it."""


@dataclass(frozen=True, slots=True)
class Found:
    """The files of a source, sorted out."""

    source: str
    pictures: int
    used: tuple[UsedPicture, ...]
    refused: tuple[RefusedFile, ...]
    duplicates: tuple[Duplicate, ...]


def check_rights(rights: Rights | None, file: str, today: date) -> None:
    """Raises DatasetRefused ``rights_expired``. That there are none is for `problems` to say."""
    if rights is not None and rights.expired(today):
        raise DatasetRefused(
            f"{file}: the rights of {rights.holder} ended on {rights.expires}; renew them, or take "
            "the picture out.",
            "rights_expired",
            file,
            details={"field": "rights.expires"},
        )


def no_caption(file: str) -> DatasetRefused:
    return DatasetRefused(
        f"{file} has no caption; write one into a .txt file of the same name, or give a trigger "
        "word.",
        "caption_missing",
        file,
        details={"field": "text"},
    )


def held_out(used: Sequence[UsedPicture], share: float) -> tuple[UsedPicture, ...]:
    """The same pictures, some of them held out: chosen by their contents, so always the same."""
    count = 0
    if share > 0 and len(used) > 1:
        count = max(2 if len(used) >= 10 else 1, round(share * len(used)))
    ranked = sorted(
        used, key=lambda one: hashlib.sha256(f"held out {one.sha256}".encode()).digest()
    )
    chosen = {one.file for one in ranked[: min(count, len(used) // 2)]}
    return tuple(dataclasses.replace(one, held_out=one.file in chosen) for one in used)


def problems(
    found: Found, *, leave_out_refused: bool, rights_required: bool
) -> tuple[Problem, ...]:
    """Why the set cannot be learnt from, the most severe first."""
    stopping = STOPPING if leave_out_refused else (*LEFT_OUT, *STOPPING)
    pictures = {one.file for one in found.used} | {one.file for one in found.duplicates}
    result = [
        Problem(one.code, one.reason, one.file, one.field)
        for code in stopping
        for one in found.refused
        if one.code == code
    ]
    unknown = [one.file for one in found.used if one.rights is None]
    if rights_required and unknown:
        result.append(
            Problem(
                "rights_missing",
                f"{len(unknown)} of {len(found.used)} pictures have no rights record, for example "
                f"{unknown[0]}; write one for the set in rights.json, or for each picture in "
                "metadata.jsonl: basis (own, licensed or consent) and holder.",
                unknown[0],
                "rights",
            )
        )
    unreadable = [one for one in found.refused if one.code in UNREADABLE]
    if len(unreadable) > MOST_UNREADABLE * max(1, found.pictures):
        names = ", ".join(one.file for one in unreadable[:10])
        result.append(
            Problem(
                "image_unreadable",
                f"{len(unreadable)} of {found.pictures} pictures cannot be read, more than "
                f"{MOST_UNREADABLE:.0%}: {names}. Replace them or take them out.",
                unreadable[0].file,
            )
        )
    if len(found.duplicates) > MOST_DUPLICATES * max(1, len(pictures)):
        first = found.duplicates[0]
        result.append(
            Problem(
                "duplicates_excessive",
                f"{len(found.duplicates)} of {len(pictures)} pictures are copies of others, more "
                f"than {MOST_DUPLICATES:.0%} (for example {first.file} of {first.of}); give "
                "different pictures.",
                first.file,
            )
        )
    if len(found.used) < FEWEST:
        result.append(_too_small(found))
    return tuple(result)


def warnings(found: Found) -> tuple[str, ...]:
    """What may make the result worse, and stops nothing."""
    result = []
    if FEWEST <= len(found.used) < ADVISED:
        result.append(f"{len(found.used)} pictures are few; {ADVISED} to 50 learn better.")
    if enlarged := [one.file for one in found.used if one.enlarged]:
        result.append(
            f"{len(enlarged)} pictures are smaller than their bucket and are enlarged, for example "
            f"{enlarged[0]}."
        )
    if cropped := [one.file for one in found.used if one.cropped > MUCH_CROPPED]:
        result.append(
            f"{len(cropped)} pictures lose more than {MUCH_CROPPED:.0%} by cropping, for example "
            f"{cropped[0]}."
        )
    alone = sum(one.caption_source is CaptionSource.TRIGGER for one in found.used)
    if alone:
        result.append(
            f"{alone} pictures have no caption: they are learnt with the trigger word alone, and "
            "so is all that is in them."
        )
    if any(one.rights is None for one in found.used):
        result.append("There is no rights record, so consent cannot be traced to the adapter.")
    return tuple(result)


def _too_small(found: Found) -> Problem:
    return Problem(
        "dataset_too_small",
        f"{found.source} has {len(found.used)} usable pictures of {found.pictures}; at least "
        f"{FEWEST} are needed, {ADVISED} to 50 are advised.",
        found.source,
    )
