"""A refusal can be appealed against, a picture reported; people answer once."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from calotype.serving.database.review.cases import Reviewer

APPEALS = "/v1/moderation/appeals"
REPORTS = "/v1/moderation/reports"
CASES = "/v1/moderation/cases"


def key_of(service: Any, team: str, *scopes: str) -> str:
    return service.database.api_keys.create(team=team, scopes=scopes)[0]


def refused(service: Any, prompt: str = "a forbidden thing") -> str:
    with pytest.raises(openai.BadRequestError) as caught:
        service.sdk().images.generate(model="shapes", prompt=prompt)
    body: Any = caught.value.body
    assert body["moderation"]["appeal_url"] == APPEALS
    return str(body["moderation"]["decision_id"])


def test_an_appeal_is_taken_by_one_reviewer_and_answered(service: Any) -> None:
    decision = refused(service)
    asked = {"decision_id": decision, "reason": "It is the name of our product."}
    case = service.http().post(APPEALS, json=asked)
    assert case.status_code == 201 and case.json()["status"] == "open"
    assert case.json()["decision_id"] == decision
    again = service.http().post(APPEALS, json=asked | {"reason": "Still."})
    assert again.json()["id"] == case.json()["id"], "asked twice it is the same case"

    one = service.http(key_of(service, "safety", "moderation"))
    two = service.http(key_of(service, "safety", "moderation"))
    assert [row["id"] for row in one.get(CASES).json()["data"]] == [case.json()["id"]]
    taken = one.post(f"{CASES}/take").json()
    assert taken["reason"] == asked["reason"]
    assert two.post(f"{CASES}/take").status_code == 204, "somebody works on it"
    answer = {"verdict": "overturned", "note": "Sorry."}
    theirs = two.post(f"{CASES}/{taken['id']}/decide", json=answer)
    assert theirs.status_code == 409 and "take it first" in theirs.json()["error"]["message"]
    done = one.post(f"{CASES}/{taken['id']}/decide", json=answer)
    assert done.json()["status"] == "overturned" and done.json()["decided_at"]
    late = one.post(f"{CASES}/{taken['id']}/decide", json=answer | {"verdict": "upheld"})
    assert late.status_code == 409 and "overturned already" in late.json()["error"]["message"]
    seen = service.http().get(f"{CASES}/{taken['id']}").json()
    assert (seen["status"], seen["note"]) == ("overturned", "Sorry.")
    assert one.get(CASES).json()["data"] == []


def test_a_reviewer_who_goes_away_loses_the_case(service: Any) -> None:
    decision, cases = refused(service), service.database.cases
    case = cases.open_appeal(service.jobs()[0].team_id, decision, "r")
    one, two = Reviewer("one", "safety"), Reviewer("two", "safety")
    assert cases.take_case(one, lease_seconds=-1.0).id == case.id
    assert cases.take_case(two).held_by == "two"
    assert cases.take_case(one) is None


def test_a_reported_picture_is_gone_when_it_is_taken_down(service: Any) -> None:
    drawn = service.generate(prompt="a red circle", response_format="url").json()
    url = drawn["data"][0]["url"]
    asset_id = url.split("/assets/")[1].split("/")[0]
    stranger = service.http(key_of(service, "others", "images"))
    assert stranger.get(url).status_code == 200
    case = stranger.post(REPORTS, json={"asset_id": asset_id, "reason": "That is me."}).json()
    assert (
        service.http(key_of(service, "third", "images")).get(f"{CASES}/{case['id']}").status_code
        == 404
    ), "another team's case"
    reviewer = service.http(key_of(service, "safety", "moderation"))
    reviewer.post(f"{CASES}/take")
    wrong = reviewer.post(f"{CASES}/{case['id']}/decide", json={"verdict": "upheld"})
    assert wrong.status_code == 409
    assert "dismissed or taken_down" in wrong.json()["error"]["message"]
    done = reviewer.post(f"{CASES}/{case['id']}/decide", json={"verdict": "taken_down"})
    assert done.json()["status"] == "taken_down"
    assert stranger.get(url).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "param", "status"),
    [
        (APPEALS, {"decision_id": "42", "reason": "r"}, "decision_id", 400),
        (APPEALS, {"decision_id": "dec_" + "0" * 24, "reason": ""}, "reason", 400),
        (APPEALS, {"reason": "r"}, "decision_id", 400),
        (APPEALS, {"decision_id": "dec_" + "0" * 24, "reason": "r", "x": 1}, "x", 400),
        (REPORTS, {"asset_id": "asset_none", "reason": "r"}, "asset_id", 404),
    ],
)
def test_what_cannot_be_a_case_is_said(
    shared_service: Any, path: str, body: dict[str, Any], param: str, status: int
) -> None:
    answer = shared_service.http().post(path, json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param


def test_the_queue_is_for_reviewers(shared_service: Any) -> None:
    client = shared_service.http(key_of(shared_service, "default", "images"))
    for answer in (client.get(CASES), client.post(f"{CASES}/take")):
        assert answer.status_code == 403
        assert "moderation" in answer.json()["error"]["message"]
