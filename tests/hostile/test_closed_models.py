"""Models and adapters that are closed to a team: it is not told that there are such."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from servers.gateway import QUICK, Service, running

from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL, ImageModel, LoRAAdapter
from calotype.serving.core.protocols import ModelStatus


def closed_to_others(adapter: LoRAAdapter, team: str) -> LoRAAdapter:
    spec = adapter.model_dump(by_alias=True)
    spec["metadata"]["name"] = "secret-style"
    spec["spec"]["access"] = {"teams": [team]}
    return LoRAAdapter.model_validate(spec)


def other_model(name: str) -> ImageModel:
    spec = BUILT_IN_MODEL.model_dump(by_alias=True)
    spec["metadata"]["name"], spec["spec"]["aliases"] = name, []
    return ImageModel.model_validate(spec)


@pytest.fixture(scope="module")
def secretive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = GatewaySettings(hangup_grace=0, **QUICK)
    with running(tmp_path_factory.mktemp("secrets"), settings) as service:
        adapters = [BUILT_IN_ADAPTER, closed_to_others(BUILT_IN_ADAPTER, "artists")]
        service.catalog.replace([BUILT_IN_MODEL, other_model("hidden-model")], adapters)
        service.database.teams.set_team("plain", allowed_models=["shapes"])

        async def status() -> list[ModelStatus]:
            loaded = {"stripes": "ready", "secret-style": "ready"}
            return [ModelStatus(name, True, 1, 0.0, loaded) for name in ("shapes", "hidden-model")]

        service.backend.status = status  # type: ignore[method-assign]
        object.__setattr__(service.gateway(), "outlives_models", True)
        yield service


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/shapes", None),
        ("GET", "/v1/models/nothing", None),
        ("GET", "/v1/models/hidden-model", None),
        ("GET", "/readyz", None),
        ("POST", "/v1/images/generations", {"prompt": "x", "loras": [{"id": "nothing"}]}),
        ("POST", "/v1/images/generations", {"prompt": "x", "model": "nothing"}),
        ("POST", "/v1/jobs", {"input": {"prompt": "x", "loras": [{"id": "nothing"}]}}),
    ],
)
def test_a_team_is_told_only_what_is_open_to_it(
    secretive: Service, method: str, path: str, body: Any
) -> None:
    """By no list, no state and no error."""
    key, _ = secretive.database.api_keys.create(team="plain")
    answer = secretive.http(key).request(method, path, json=body)
    told = answer.text.replace("The model 'hidden-model'", "")
    assert "secret-style" not in told
    assert "hidden-model" not in told or path == "/readyz"


def test_what_is_closed_and_what_is_not_there_are_told_in_the_same_words(
    secretive: Service,
) -> None:
    client = secretive.http(secretive.database.api_keys.create(team="plain")[0])

    def refusals(**body: Any) -> list[str]:
        answers = [
            client.post("/v1/images/generations", json={"prompt": "x"} | body),
            client.post("/v1/jobs", json={"input": {"prompt": "x"} | body}),
        ]
        assert [answer.status_code for answer in answers] == [404, 404]
        return [str(answer.json()["error"]["message"]) for answer in answers]

    def renamed(messages: list[str], name: str) -> list[str]:
        return [message.replace(name, "nothing") for message in messages]

    nothing_there = refusals(loras=[{"id": "nothing"}])
    assert renamed(refusals(loras=[{"id": "secret-style"}]), "secret-style") == nothing_there
    assert renamed(refusals(model="hidden-model"), "hidden-model") == refusals(model="nothing")
    artists, _ = secretive.database.api_keys.create(team="artists")
    drawn = secretive.http(artists).post(
        "/v1/images/generations", json={"prompt": "x", "loras": [{"id": "secret-style"}]}
    )
    assert drawn.status_code == 200
