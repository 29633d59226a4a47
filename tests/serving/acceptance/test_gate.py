"""The whole gate over painted pictures: good candidates pass, each kind of bad one is refused."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime

import pytest
from tests.samples import concepts
from tests.samples.painted_studio import Kind, PaintedStudio

from calotype.serving.acceptance.gate import Accepted, Candidate, TrainingPicture, accept
from calotype.serving.acceptance.report import Report
from calotype.serving.config import BUILT_IN_MODEL
from calotype.serving.config.model.acceptance import Acceptance

REFUSED_BY: dict[Kind, str] = {
    "random": "subject",
    "wrong concept": "subject",
    "overfit": "classPrompts",
    "copied": "originality",
    "unsafe": "safety",
}


def judged(
    kind: Kind, seed: int, slips: float = 0.0, replaces: Report | None = None, pictures: int = 8
) -> Accepted:
    names = list(concepts.OUTLINES)
    concept, other = random.Random(seed).sample(names, 2)
    data = concepts.data_set(concept, 20, seed)
    training = [pixels for pixels, _ in data]
    candidate = Candidate(
        concept,
        f"{seed:064x}",
        concepts.TRIGGER,
        tuple(TrainingPicture(f"{i:02}.png", p, i % 10 == 9) for i, p in enumerate(training)),
    )
    return accept(
        PaintedStudio(kind, concept, other, training, slips, seed),
        candidate,
        BUILT_IN_MODEL,
        Acceptance(pictures=pictures, seed=seed),
        replaces=replaces,
        now=lambda: datetime(2026, 1, 2, tzinfo=UTC),
    )


@pytest.mark.parametrize("kind", REFUSED_BY)
def test_each_kind_of_bad_candidate_is_refused_by_its_gate(kind: Kind) -> None:
    report = judged(kind, 0).report
    failed = {gate.name for gate in report.gates if not gate.passed}
    assert report.outcome == "refused"
    assert REFUSED_BY[kind] in failed
    assert len(report.reasons) == len(failed)


def test_a_good_candidate_is_promoted_although_it_slips_now_and_then() -> None:
    report = judged("good", 5, slips=0.1, pictures=24).report
    assert (report.outcome, report.reasons) == ("promoted", ())


def test_the_report_shows_every_picture_and_what_it_replaces() -> None:
    before = judged("good", 1).report
    accepted = judged("copied", 1, replaces=before)
    html = accepted.html()
    assert html.count("data:image/webp;base64,") == 8 + 2 * 8
    assert "copy of 0" in html
    assert "Bound before" in html
    assert "http" not in html.replace("http-equiv", "")
    report = json.loads(accepted.report.to_json())
    assert report["replaces"] == before.sha256
    assert report["outcome"] == "refused"
    assert Report.model_validate(report) == accepted.report
    status = accepted.report.status("acceptance/x.json").model_dump(by_alias=True)
    assert (status["passed"], status["report"]) == (False, "acceptance/x.json")


def test_prompts_of_the_manifest_take_the_place_of_the_package_s() -> None:
    data = concepts.data_set("arrow", 20, 0)
    training = tuple(TrainingPicture(f"{i}.png", pixels) for i, (pixels, _) in enumerate(data))
    studio = PaintedStudio("good", "arrow", "tee", [picture.pixels for picture in training])
    report = accept(
        studio,
        Candidate("a", "0" * 64, "zorbl", training),
        BUILT_IN_MODEL,
        Acceptance(
            prompts=["a large red {trigger} on a blue background, in the center"],
            class_prompts=["a small white star on a black background, on the left"],
            pictures=8,
        ),
    ).report
    assert {p.prompt for p in report.subject_pictures} == {
        "a large red zorbl on a blue background, in the center"
    }
    assert len(report.class_pictures) == 8
