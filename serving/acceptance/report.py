"""The report of an acceptance set: a document for programs, and one HTML file with its pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import jinja2
from pydantic import BaseModel, ConfigDict

from calotype.serving.acceptance.decision import Outcome, Verdict
from calotype.serving.acceptance.measurement import Measurement, Shown
from calotype.serving.config.model.acceptance import Acceptance, AcceptanceStatus, GateResult

if TYPE_CHECKING:
    from calotype.serving.core.request import Pixels


class PictureScores(BaseModel):
    """One picture of the candidate, without its pixels."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    seed: int
    refused: str = ""
    subject: float | None = None
    adherence: float | None = None
    base_adherence: float | None = None
    copy_of: str | None = None
    """Name of the training picture."""


class Report(BaseModel):
    """What an acceptance set showed: the JSON form, which is kept with the candidate."""

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str
    """Of the candidate's file, or of all files of a model."""
    model: str
    judge: str
    created: str
    """RFC 3339, UTC."""
    acceptance: Acceptance
    outcome: Outcome
    gates: tuple[GateResult, ...]
    reasons: tuple[str, ...]
    subject_pictures: tuple[PictureScores, ...]
    class_pictures: tuple[PictureScores, ...]
    replaces: str | None = None
    """sha256 of the revision that served before."""

    @property
    def passed(self) -> bool:
        return self.outcome != "refused"

    def status(self, key: str | None = None) -> AcceptanceStatus:
        """As the status of an object says it.

        Args:
            key: of this report in the object store.
        """
        return AcceptanceStatus(
            sha256=self.sha256,
            passed=self.passed,
            gates=list(self.gates),
            report=key,
            time=self.created,
        )

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, by_alias=True, exclude_none=True)


def make_report(
    measurement: Measurement,
    verdict: Verdict,
    acceptance: Acceptance,
    *,
    name: str,
    sha256: str,
    model: str,
    judge: str,
    created: str,
    training_names: Sequence[str] = (),
    replaces: Report | None = None,
) -> Report:
    def scores(shown: Shown) -> PictureScores:
        return PictureScores(
            prompt=shown.drawn.prompt,
            seed=shown.drawn.seed,
            refused=shown.drawn.refused,
            subject=shown.subject,
            adherence=shown.adherence,
            base_adherence=shown.base_adherence,
            copy_of=None if shown.copy_of is None else training_names[shown.copy_of],
        )

    return Report(
        name=name,
        sha256=sha256,
        model=model,
        judge=judge,
        created=created,
        acceptance=acceptance,
        outcome=verdict.outcome,
        gates=verdict.gates,
        reasons=verdict.reasons,
        subject_pictures=tuple(map(scores, measurement.subjects)),
        class_pictures=tuple(map(scores, measurement.classes)),
        replaces=None if replaces is None else replaces.sha256,
    )


def html_report(report: Report, measurement: Measurement, replaces: Report | None = None) -> str:
    """One file that needs no other: pictures are inside it.

    Args:
        replaces: the report of the revision that served before, for comparison.
    """
    before = {gate.name: gate for gate in replaces.gates} if replaces is not None else {}
    return _template().render(
        report=report,
        replaces=replaces,
        gates=[(gate, before.get(gate.name)) for gate in report.gates],
        subjects=list(zip(report.subject_pictures, measurement.subjects, strict=True)),
        classes=list(zip(report.class_pictures, measurement.classes, strict=True)),
        data_url=data_url,
    )


def data_url(pixels: Pixels | None) -> str:
    """A picture as the address of itself; "" for none."""
    from PIL import Image

    if pixels is None:
        return ""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((256, 256))
    image.save(file, "webp", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("calotype.serving.acceptance", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2")
