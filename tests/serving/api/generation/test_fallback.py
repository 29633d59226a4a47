"""A model that cannot draw in time hands its requests to the one that its manifest names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL, ImageModel
from calotype.serving.config.base import ModelRef
from calotype.serving.core.protocols import ModelStatus
from calotype.serving.jobs.forecast import Forecast

STRIPES = BUILT_IN_ADAPTER.model_copy(
    update={"spec": BUILT_IN_ADAPTER.spec.model_copy(update={"model_ref": ModelRef(name="main")})}
)
SPEC = BUILT_IN_MODEL.spec.model_dump(mode="json", by_alias=True, exclude_none=True)


def model(name: str, fallback: dict[str, Any] | None = None, **spec: Any) -> ImageModel:
    content = {**SPEC, "aliases": [], **spec}
    if fallback is not None:
        content["fallback"] = fallback
    return ImageModel.model_validate({"metadata": {"name": name}, "spec": content})


class Reporting:
    """A backend of which models say that they are well as the test wants it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.ready = {"main": True, "spare": True, "third": True}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def status(self) -> list[ModelStatus]:
        return [ModelStatus(name, ready) for name, ready in self.ready.items()]


@pytest.fixture
def two_models(start_service: Callable[..., Any]) -> Iterator[Any]:
    """`main`, which falls back to `spare` after ten seconds, and what says who is ready."""
    backends: list[Reporting] = []

    def wrap(backend: Any) -> Reporting:
        backends.append(Reporting(backend))
        return backends[0]

    service = start_service(wrap=wrap)
    first = model(
        "main",
        {"modelRef": {"name": "spare"}, "when": {"queueSecondsAbove": 10}},
        aliases=["dall-e-3"],
    )
    service.catalog.replace([first, model("spare")], [STRIPES])
    service.ready = backends[0].ready
    yield service


def drawn_by(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


def work_for(service: Any, name: str, seconds: float) -> None:
    """As its dispatcher says; the one of this service speaks for a model of another name."""
    service.database.forecasts.save_forecast(
        Forecast(name, service.database.clock.time(), queued=9, backlog_seconds=seconds)
    )


def test_a_model_that_is_well_draws_itself(two_models: Any) -> None:
    answer = two_models.generate(prompt="a red circle", model="dall-e-3")
    assert drawn_by(answer) == "main"
    assert "warnings" not in answer.json()


def test_the_fallback_draws_while_the_model_is_not_ready(two_models: Any) -> None:
    two_models.ready["main"] = False
    answer = two_models.generate(prompt="a red circle", model="dall-e-3")
    assert drawn_by(answer) == "spare"
    assert answer.json()["warnings"] == ["spare draws instead of main, which is not ready."]
    assert answer.json()["recipe"]["model"]["name"] == "spare"
    two_models.ready["main"] = True
    assert drawn_by(two_models.generate(prompt="a red circle", model="main")) == "main"


def test_the_fallback_draws_when_the_queue_is_longer_than_the_manifest_allows(
    two_models: Any,
) -> None:
    work_for(two_models, "main", 9.0)
    assert drawn_by(two_models.generate(prompt="a red circle")) == "main"
    work_for(two_models, "main", 1000.0)
    answer = two_models.generate(prompt="a red circle")
    assert drawn_by(answer) == "spare"
    assert "(its limit is 10 s)" in answer.json()["warnings"][0]


def test_a_fallback_that_is_away_hands_on_to_its_own(two_models: Any) -> None:
    spare = model("spare", {"modelRef": {"name": "third"}})
    first = model("main", {"modelRef": {"name": "spare"}})
    two_models.catalog.replace([first, spare, model("third")])
    two_models.ready |= {"main": False, "spare": False}
    assert drawn_by(two_models.generate(prompt="a red circle")) == "third"
    two_models.ready["third"] = False
    job = two_models.http().post("/v1/jobs", json={"input": {"prompt": "a red circle"}})
    assert job.json()["model"] == "main"


def test_what_the_fallback_cannot_draw_waits_for_the_model(two_models: Any) -> None:
    two_models.ready["main"] = False
    body = {"prompt": "a red circle", "loras": [{"id": "stripes"}]}
    assert two_models.http().post("/v1/jobs", json={"input": body}).json()["model"] == "main"


def test_a_team_that_may_not_use_the_fallback_waits(two_models: Any) -> None:
    two_models.ready["main"] = False
    two_models.database.teams.set_team("default", allowed_models=["main"])
    job = two_models.http().post("/v1/jobs", json={"input": {"prompt": "a red circle"}})
    assert job.json()["model"] == "main"


def test_a_repetition_joins_the_job_of_the_fallback(two_models: Any) -> None:
    two_models.ready["main"] = False
    headers = {"idempotency-key": "one"}
    http = two_models.http()
    body = {"prompt": "a red circle"}
    first = http.post("/v1/images/generations", json=body, headers=headers).json()
    two_models.ready["main"] = True
    again = http.post("/v1/images/generations", json=body, headers=headers).json()
    assert (first["model"], again["job_id"]) == ("spare", first["job_id"])


def test_a_recipe_is_drawn_again_by_the_model_that_drew_it(two_models: Any) -> None:
    first = two_models.generate(prompt="a red circle").json()
    two_models.ready["main"] = False
    again = two_models.http().post("/v1/jobs", json={"recipe": first["recipe"]})
    assert again.json()["model"] == "main"
