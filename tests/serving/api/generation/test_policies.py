"""Whose policy checks a request, and levels that callers ask for: what the gateway passes on."""

from __future__ import annotations

from typing import Any

import pytest

from calotype.serving.config import BUILT_IN_ADAPTER, BUILT_IN_MODEL, PolicyRef
from calotype.serving.core.decision import CheckScope
from calotype.serving.testing.in_memory import decision


def scopes(service: Any) -> list[Any]:
    """For whom something was checked since the last call."""
    found = list(service.safety.scopes)
    service.safety.scopes.clear()
    return found


def test_a_team_is_checked_by_its_policy_too_everywhere(service: Any) -> None:
    assert service.generate(prompt="a dog").status_code == 200
    assert set(map(str, scopes(service))) == {"None"}
    service.database.teams.set_team("kids", policy="kids-policy")
    http = service.http(service.database.api_keys.create(team="kids")[0])
    drawn = http.post("/v1/images/generations", json={"prompt": "a dog"})
    assert drawn.status_code == 200, drawn.text
    checked = scopes(service)
    assert len(checked) == 2 and all(s == CheckScope(("kids-policy",)) for s in checked)
    assert http.post("/v1/moderations", json={"input": "a dog"}).status_code == 200
    assert scopes(service) == [CheckScope(("kids-policy",))]
    job = http.get(f"/v1/jobs/{drawn.json()['job_id']}").json()
    assert "kids-policy" not in str(job), "which policies a team has is not the caller's affair"


def test_an_adapter_brings_its_policy(service: Any) -> None:
    strict = BUILT_IN_ADAPTER.spec.model_copy(
        update={"moderation_policy_ref": PolicyRef(name="brand")}
    )
    adapter = BUILT_IN_ADAPTER.model_copy(update={"spec": strict})
    service.catalog.replace([BUILT_IN_MODEL], [adapter])
    service.database.teams.set_team("kids", policy="kids-policy")
    http = service.http(service.database.api_keys.create(team="kids")[0])
    body = {"prompt": "a dog", "loras": [{"id": adapter.name, "scale": 0.5}]}
    assert http.post("/v1/images/generations", json=body).status_code == 200
    assert all(s == CheckScope(("kids-policy", "brand")) for s in scopes(service))
    assert http.post("/v1/images/generations", json={"prompt": "a dog"}).status_code == 200
    assert all(s == CheckScope(("kids-policy",)) for s in scopes(service))


def test_a_refused_team_may_read_but_not_draw(service: Any) -> None:
    service.database.teams.ensure_team("kids")
    http = service.http(service.database.api_keys.create(team="kids")[0])
    job = http.post("/v1/images/generations", json={"prompt": "a dog"}).json()["job_id"]
    service.catalog.close({"kids": "Its policy is laxer than the model's."})
    refused = http.post("/v1/images/generations", json={"prompt": "a dog"})
    assert refused.status_code == 403
    assert "Its policy is laxer than the model's." in refused.json()["error"]["message"]
    assert http.get(f"/v1/jobs/{job}").status_code == 200
    assert service.generate(prompt="a dog").status_code == 200


@pytest.mark.parametrize(
    ("asked", "level"),
    [
        ({}, None),
        ({"moderation": "auto"}, None),
        ({"moderation": "low"}, "low"),
        ({"safety_tolerance": 0}, "0"),
        ({"safety_tolerance": 6}, "6"),
        ({"safety_tolerance": 5, "moderation": "auto"}, "5"),
    ],
)
def test_a_level_reaches_the_safety_stage_and_the_recipe(
    service: Any, asked: dict[str, Any], level: str | None
) -> None:
    plain = service.generate(prompt="a dog", seed=3).json()
    scopes(service)
    drawn = service.generate(prompt="a dog", seed=3, **asked).json()
    expected = None if level is None else CheckScope((), level)
    assert all(scope == expected for scope in scopes(service))
    assert (drawn["recipe_hash"] == plain["recipe_hash"]) is (level is None)
    again = service.http().post(
        "/v1/jobs", json={"recipe": drawn["recipe"]}, headers={"prefer": "wait=30"}
    )
    assert again.json()["recipe_hash"] == drawn["recipe_hash"]
    assert all(scope == expected for scope in scopes(service))


@pytest.mark.parametrize("value", [-1, 7, 2.5, "3", True])
def test_other_levels_are_refused_by_name(shared_service: Any, value: Any) -> None:
    answer = shared_service.generate(prompt="a dog", safety_tolerance=value)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "safety_tolerance"
    other = shared_service.generate(prompt="a dog", moderation="none")
    assert (other.status_code, other.json()["error"]["param"]) == (400, "moderation")


def test_two_levels_at_once_are_refused(shared_service: Any) -> None:
    answer = shared_service.generate(prompt="a dog", safety_tolerance=5, moderation="low")
    assert answer.status_code == 400
    assert "give one of them" in answer.json()["error"]["message"]


def test_what_was_not_granted_is_said(service: Any) -> None:
    service.safety.prompt = lambda text: (
        decision("input") | {"asked": "low", "preset": "auto", "granted": False}
    )
    service.safety.image = lambda pixels: decision("output") | {"preset": "auto"}
    (warning,) = service.generate(prompt="a dog", moderation="low").json()["warnings"]
    assert warning == (
        "moderation 'low' is not granted by the policy scripted@1; it was checked against 'auto'."
    )
