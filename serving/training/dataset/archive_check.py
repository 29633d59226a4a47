"""Checks an uploaded archive: what a gateway does with POST /v1/datasets."""

from __future__ import annotations

import pathlib
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from calotype.serving.config.rights import Rights
from calotype.serving.training.dataset.captions import Wording
from calotype.serving.training.dataset.places.archives import ArchiveSource
from calotype.serving.training.dataset.preparation import Options, prepare
from calotype.serving.training.dataset.report import DatasetReport
from calotype.serving.training.dataset.screening import Screen

Word = Annotated[str, Field(min_length=1, max_length=200)]


class DatasetSettings(BaseModel):
    """What is asked of a data set, in a request and in its row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    resolution: int = Field(
        1024, ge=64, le=4096, multiple_of=16, description="Side of a square bucket, in pixels."
    )
    trigger_word: Word | None = Field(None, description="Word that evokes the adapter.")
    class_word: Word | None = Field(None, description="What the trigger is one of.")
    prefix: str = Field("", max_length=1000, description="Put before every caption.")
    suffix: str = Field("", max_length=1000, description="Put after every caption.")
    default_caption: str | None = Field(
        None, min_length=1, max_length=4000, description="Caption of pictures that have none."
    )
    holdout: float = Field(
        0.1, ge=0, le=0.5, description="Share of pictures that is not learnt from."
    )
    duplicates_within: int = Field(
        31, ge=0, le=128, description="Bits of the PDQ hash in which copies may differ."
    )
    rights: Rights | None = Field(
        None, description="Of pictures that bring no record of their own."
    )
    leave_out_refused: bool = Field(
        False, description="Leave out what the safety stage refuses or whose rights have ended."
    )

    def options(self, without: frozenset[str] = frozenset()) -> Options:
        """Args:
        without: pictures that may not be learnt from.
        """
        return Options(
            resolution=self.resolution,
            wording=Wording(
                self.trigger_word, self.class_word, self.prefix, self.suffix, self.default_caption
            ),
            holdout=self.holdout,
            distance=self.duplicates_within,
            rights=self.rights,
            leave_out_refused=self.leave_out_refused,
            without=without,
        )

    @classmethod
    def from_payload(cls, payload: object) -> Self:
        """As a row of the database has it."""
        return cls.model_validate(payload)


def check_archive(
    path: pathlib.Path,
    name: str,
    settings: DatasetSettings,
    screen: Screen,
    without: frozenset[str] = frozenset(),
) -> DatasetReport:
    """Args:
        name: what the report calls the archive.
        without: sha256 of pictures whose consent was taken back.

    Raises:
        DatasetRefused, ModerationUnavailable: see `prepare`.
    """
    with ArchiveSource(path, name=name) as source:
        return prepare(source, settings.options(without), screen=screen).report
