"""What processes say to each other about jobs survives the way, also from another release."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.moderation.policy.rulebook import Scope
from calotype.moderation.testing import FixedTextClassifier
from calotype.serving.core.conditions import ControlRef, ReferenceUse
from calotype.serving.core.decision import CheckScope, Decision, PolicyVersion
from calotype.serving.core.errors import EngineError, InvalidRequest, error_from_payload
from calotype.serving.core.request import (
    AdapterRef,
    GenerationRequest,
    ImageSize,
    Margins,
    SamplingParams,
)
from calotype.serving.jobs.forecast import Forecast
from calotype.serving.jobs.lease import Lease, LeaseProgress
from calotype.serving.jobs.moderation_record import HeldEntry, ModerationRecord
from calotype.serving.jobs.options import JobOptions
from calotype.serving.jobs.predictor import Work, WorkPredictor
from calotype.serving.jobs.records import Checkpoint, PreviewRecord
from calotype.serving.jobs.result import (
    BlockedImage,
    GenerationResult,
    HeldImage,
    ImageResult,
    JobMetrics,
    MapResult,
    TokenUsage,
)

Payload = dict[str, Any]

REQUEST = GenerationRequest(
    id="job_1",
    prompt="a fox",
    size=ImageSize(512, 256),
    rendered_size=ImageSize(256, 128),
    sampling=SamplingParams(4, 3.5, sigmas=(1.0, 0.7, 0.4, 0.1), true_guidance_scale=2.0),
    seed=7,
    n=2,
    adapters=(AdapterRef("stripes", 0.5),),
    negative_prompt="a dog",
    references=("a", "b"),
    reference_uses=(ReferenceUse("style", 0.5, 0.3, 1.0, 4096), ReferenceUse()),
    controls=(ControlRef("layout", "t/ab/m.png", "canny", 0.8, 0.1, 0.9),),
    expand=Margins(left=8),
    deadline_seconds=30.0,
)
DECISION = Decision(
    "REVIEW", True, True, False, "dec_1", "output", "house@1", "ab", "strict", ("sexual",),
    details={"scores": {"sexual": 0.7}},
)  # fmt: skip
LEASE = Lease(
    "job_1",
    3,
    REQUEST,
    JobOptions("req_1", "jpeg", 80, True, CheckScope(("kids",), "low"), "00-1-2-01"),
    "team_1",
    1e9,
    {"version": 1, "seed": 7},
    Checkpoint("job_1", 1, 2, "t/checkpoints/x"),
    PolicyVersion("ab", "strict"),
    ("sexual",),
)
RESULT = GenerationResult(
    [ImageResult("asset_1", "t/ab/x.png", 0, 7, 512, 256, "image/png", "cd", True)],
    [BlockedImage(1, ["hate"], "dec_2", "house@1")],
    JobMetrics(
        gpu_seconds=1.5,
        steps=4,
        devices=2,
        maps_fitted=["controlnets[0]: 64x64 to 128x128"],
        warnings=["The prompt is too long."],
    ),
    TokenUsage(5, 100, 64),
    [DECISION, replace(DECISION, id="dec_2")],
    replace(DECISION, stage="input"),
    [HeldImage("asset_2", "t/held/y", "00ff", 2, 9, 512, 256, "image/png", "ef", ["sexual"])],
    [MapResult("asset_3", "t/ab/z.png", 0, 128, 128, "0f", "64x64")],
)
RECORD = ModerationRecord(
    DECISION, (DECISION,), (HeldEntry(2, "case_1", "asset_2", ("sexual",), "released"),)
)
PREDICTOR = WorkPredictor(0.5)
PREDICTOR.learn(Work("256x128", 4, 2), 3.0)
FORECAST = Forecast("shapes", 5.0, 2, 9.0, 1.5, 0.1, PREDICTOR.to_payload(), {"a": 1.0}, {"a": 0})

WORDS: list[tuple[Any, Callable[[Payload], Any]]] = [
    (REQUEST, GenerationRequest.from_payload),
    (DECISION, Decision.from_payload),
    (LEASE.options, JobOptions.from_payload),
    (LEASE, Lease.from_payload),
    (RESULT, GenerationResult.from_payload),
    (RECORD, ModerationRecord.from_payload),
    (LeaseProgress(3, 2, 4), LeaseProgress.from_payload),
    (LEASE.checkpoint, Checkpoint.from_payload),
    (PreviewRecord("job_1", 0, 1, 3, 2, "t/x", "image/png"), PreviewRecord.from_payload),
    (FORECAST, lambda payload: Forecast.from_payload("shapes", payload)),
]
IDS = [type(word).__name__ for word, _ in WORDS]


@pytest.mark.parametrize(("word", "read"), WORDS, ids=IDS)
def test_what_is_written_is_read(word: Any, read: Callable[[Payload], Any]) -> None:
    assert read(json.loads(json.dumps(word.to_payload()))) == word


@pytest.mark.parametrize(("word", "read"), WORDS, ids=IDS)
def test_fields_of_a_later_release_do_no_harm(word: Any, read: Callable[[Payload], Any]) -> None:
    found = read(json.loads(json.dumps(word.to_payload())) | {"of_a_later_release": {"x": 1}})
    if isinstance(word, Decision | ModerationRecord):  # these are kept
        assert found.to_payload()["of_a_later_release"] == {"x": 1}
    else:
        assert found == word


@pytest.mark.parametrize("word", [LEASE, RESULT], ids=["lease", "result"])
def test_a_higher_version_is_refused(word: Lease | GenerationResult) -> None:
    payload = word.to_payload()
    assert type(word).from_payload({k: v for k, v in payload.items() if k != "version"}) == word
    with pytest.raises(EngineError, match=f"version {payload['version'] + 1} cannot be read"):
        type(word).from_payload(payload | {"version": payload["version"] + 1})


def test_an_error_is_read_as_its_class_and_an_unknown_one_as_the_root() -> None:
    error = InvalidRequest("no", code="invalid_value", param="size", details={"a": 1})
    found = error_from_payload(json.loads(json.dumps(error.to_payload())))
    assert type(found) is InvalidRequest and found.args == error.args
    later = error_from_payload(error.to_payload() | {"class": "OfALaterRelease"})
    assert (later.message, later.code, later.param) == ("no", "invalid_value", "size")


@pytest.mark.parametrize("score", [0.0, 0.99])
def test_decisions_of_the_safety_stage_keep_all_that_it_wrote(score: float) -> None:
    stage = Moderator(
        Policy.default(),
        text_classifiers=[FixedTextClassifier({"sexual": score})],
        image_classifiers=[],
    )
    made = stage.check_prompt("a hat")
    found = Decision.from_payload(json.loads(json.dumps(made.to_payload())))
    assert found.blocked is made.blocked and found.flagged is made.flagged
    assert found.categories == tuple(made.categories) and found.version.sha256 == made.policy_sha256
    assert found.to_payload() == json.loads(json.dumps(made.to_payload()))


@pytest.mark.parametrize("payload", [None, {}, [], "ALLOW", {"verdict": "ALLOW"}])
def test_what_is_no_decision_lets_nothing_pass(payload: object) -> None:
    found = Decision.from_payload(payload)
    assert found.undecided and found.blocked


def test_the_safety_stage_reads_the_scope_of_a_job() -> None:
    scope = CheckScope(("kids", "house"), "low")
    assert CheckScope.from_payload(json.loads(json.dumps(scope.to_payload()))) == scope
    assert Scope.from_payload(scope.to_payload()) == Scope(("kids", "house"), "low")
    assert CheckScope.from_payload({"policies": ["kids"]}) == CheckScope(("kids",))
    assert CheckScope.from_payload(None) is None


def test_rows_of_the_first_release_are_read() -> None:
    assert JobOptions.from_payload({}, "job_1") == JobOptions("job_1")
    assert JobOptions.from_payload({"output_compression": None, "size": "8x8"}, "j").scope is None
    assert ModerationRecord.from_payload(None) == ModerationRecord()
    old = {"input": {"verdict": "BLOCK", "blocked": True, "categories": ["hate"]}, "output": []}
    record = ModerationRecord.from_payload(old)
    assert record.input is not None and record.input.categories == ("hate",)
    assert not record.input.undecided and record.input.id is None


def test_devices_that_draw_together_take_their_time_at_once() -> None:
    assert JobMetrics(gpu_seconds=8.0).drawing_seconds == 8.0
    assert JobMetrics(gpu_seconds=8.0, devices=2).drawing_seconds == 4.0
