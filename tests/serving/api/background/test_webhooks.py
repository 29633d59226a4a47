"""Webhooks as receivers see them: signed, repeated, logged, verified by their libraries."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
import standardwebhooks

from calotype.serving.webhooks import sender

pytestmark = pytest.mark.slow

ENDPOINTS = "/v1/webhook_endpoints"
LOCAL: dict[str, Any] = {"outbound_http": True, "outbound_networks": ("127.0.0.0/8",)}


@dataclass
class Receiver:
    """A server that notes what comes and answers as it is told."""

    url: str = ""
    came: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    hang: threading.Event = field(default_factory=threading.Event)

    def until(self, count: int) -> None:
        end = time.monotonic() + 600
        while len(self.came) < count:
            assert time.monotonic() < end, f"{len(self.came)} of {count} events came"
            time.sleep(0.01)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    found.hang.set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.came.append(({k.lower(): v for k, v in self.headers.items()}, body))
            found.hang.wait(600)
            status, headers = found.answers.pop(0) if found.answers else (204, {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}/hook"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    found.hang.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def hooked(start_service: Callable[..., Any], quick: Callable[..., Any]) -> Any:
    return start_service(settings=quick(**LOCAL))


def submit(service: Any, prompt: str = "a dog", **more: Any) -> dict[str, Any]:
    answer = service.http().post("/v1/jobs", json={"input": {"prompt": prompt}, **more})
    assert answer.status_code in (200, 202), answer.text
    found: dict[str, Any] = answer.json()
    return found


def register(service: Any, receiver: Receiver, *events: str) -> dict[str, Any]:
    body = {"url": receiver.url, "name": "hook", "event_types": list(events)}
    answer = service.http().post(ENDPOINTS, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def deliveries(service: Any, **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        service.http().get("/v1/webhook_deliveries", params=query).json()["data"]
    )
    return found


def settled(service: Any, status: str, count: int = 1) -> list[dict[str, Any]]:
    """The deliveries once so many of them have this status."""
    end = time.monotonic() + 600
    while len(found := deliveries(service, status=status)) < count:
        assert time.monotonic() < end, deliveries(service)
        time.sleep(0.02)
    return found


def test_a_jobs_own_webhook_is_told_once_and_both_libraries_verify_it(
    hooked: Any, receiver: Receiver
) -> None:
    secret = hooked.http().get("/v1/webhooks/default/secret").json()["key"]
    job = submit(hooked, webhook={"url": receiver.url}, metadata={"t": "1"})
    receiver.until(1)
    headers, body = receiver.came[0]
    event = standardwebhooks.Webhook(secret).verify(body.decode(), headers)
    assert event["type"] == "image.job.succeeded"
    assert event["data"]["id"] == job["id"]
    assert event["data"]["metadata"] == {"t": "1"}
    assert event["data"]["output"]["images"][0]["asset_id"]
    assert '"b64_json":' not in body.decode() and len(body) < 20_000
    client = openai.OpenAI(api_key="x", webhook_secret=secret)
    unwrapped = client.webhooks.unwrap(body.decode(), headers)
    assert unwrapped.type == "image.job.succeeded"
    assert unwrapped.data.id == job["id"]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.decode() + " ", headers)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        other = "whsec_" + "QUFB" * 10
        standardwebhooks.Webhook(other).verify(body.decode(), headers)
    [delivery] = settled(hooked, "delivered")
    assert delivery["job_id"] == job["id"]
    assert [a["http_status"] for a in delivery["attempts"]] == [204]
    assert len(receiver.came) == 1


def test_an_endpoint_gets_the_events_that_it_asked_for(hooked: Any, receiver: Receiver) -> None:
    endpoint = register(hooked, receiver, "image.job.failed", "image.job.started")
    assert endpoint["signing_secret"].startswith("whsec_")
    submit(hooked, "something forbidden")
    submit(hooked, "a dog")
    receiver.until(2)
    settled(hooked, "delivered", 2)
    verify = standardwebhooks.Webhook(endpoint["signing_secret"]).verify
    kinds = {verify(body.decode(), headers)["type"] for headers, body in receiver.came}
    assert kinds == {"image.job.failed", "image.job.started"}


def test_a_failed_delivery_is_repeated_with_the_same_id_and_body(
    hooked: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "RETRY_DELAYS", (0.05, 0.05, 0.05))
    receiver.answers = [(500, {}), (302, {"location": receiver.url}), (200, {})]
    submit(hooked, webhook={"url": receiver.url})
    [delivery] = settled(hooked, "delivered")
    assert [a["http_status"] for a in delivery["attempts"]] == [500, 302, 200]
    assert len({body for _, body in receiver.came}) == 1
    assert len({headers["webhook-id"] for headers, _ in receiver.came}) == 1
    secret = hooked.http().get("/v1/webhooks/default/secret").json()["key"]
    for headers, body in receiver.came:
        standardwebhooks.Webhook(secret).verify(body.decode(), headers)


def test_a_receiver_that_never_answers_well_is_given_up_and_can_be_sent_again(
    hooked: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "RETRY_DELAYS", (0.02, 0.02))
    receiver.answers = [(503, {})] * 3
    submit(hooked, webhook={"url": receiver.url})
    [delivery] = settled(hooked, "failed")
    assert len(delivery["attempts"]) == 3
    assert delivery["next_attempt_at"] is None
    again = hooked.http().post(f"/v1/webhook_deliveries/{delivery['id']}/redeliver")
    assert again.json()["status"] == "pending"
    [delivered] = settled(hooked, "delivered")
    assert delivered["id"] == delivery["id"]
    assert receiver.came[-1][1] == receiver.came[0][1]


def test_an_endpoint_that_is_gone_is_disabled(hooked: Any, receiver: Receiver) -> None:
    endpoint = register(hooked, receiver, "image.job.succeeded")
    receiver.answers = [(410, {})]
    submit(hooked)
    settled(hooked, "failed")
    path = f"{ENDPOINTS}/{endpoint['id']}"
    end = time.monotonic() + 600
    while (shown := hooked.http().get(path).json())["enabled"]:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert "410" in shown["disabled_reason"]
    submit(hooked)
    assert len(receiver.came) == 1
    assert hooked.http().post(path, json={"enabled": True}).json()["enabled"]
    submit(hooked)
    receiver.until(2)


def test_a_receiver_that_is_slow_is_asked_again_much_later(hooked: Any, receiver: Receiver) -> None:
    receiver.answers = [(429, {"retry-after": "500"})]
    submit(hooked, webhook={"url": receiver.url})
    receiver.until(1)
    end, later = time.monotonic() + 600, int(time.time()) + 450
    # While it is asked, the next attempt is the one that whoever finds it left over would make.
    while (found := deliveries(hooked)[0])["next_attempt_at"] < later:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert found["status"] == "pending"


def test_a_receiver_that_hangs_delays_nobody(hooked: Any, receiver: Receiver) -> None:
    receiver.hang.clear()
    for _ in range(3):
        submit(hooked, webhook={"url": receiver.url})
    receiver.until(3)
    assert hooked.generate(prompt="a dog").status_code == 200
    receiver.hang.set()
    settled(hooked, "delivered", 3)


def test_after_a_rotation_both_secrets_sign(hooked: Any, receiver: Receiver) -> None:
    endpoint = register(hooked, receiver, "image.job.succeeded")
    rotated = hooked.http().post(f"{ENDPOINTS}/{endpoint['id']}/rotate_secret").json()
    assert rotated["signing_secret"] != endpoint["signing_secret"]
    submit(hooked)
    receiver.until(1)
    headers, body = receiver.came[0]
    assert len(headers["webhook-signature"].split(" ")) == 2
    for secret in (endpoint["signing_secret"], rotated["signing_secret"]):
        standardwebhooks.Webhook(secret).verify(body.decode(), headers)
    path = f"{ENDPOINTS}/{endpoint['id']}/rotate_secret"
    last = hooked.http().post(path, json={"keep_old_secret_active_for_24_hours": False}).json()
    submit(hooked)
    receiver.until(2)
    headers, body = receiver.came[1]
    standardwebhooks.Webhook(last["signing_secret"]).verify(body.decode(), headers)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(rotated["signing_secret"]).verify(body.decode(), headers)


def test_openais_sdk_manages_endpoints(hooked: Any, receiver: Receiver) -> None:
    hooks = hooked.sdk().webhooks
    made = hooks.create(url=receiver.url, name="ci", event_types=["image.job.succeeded"])
    assert made.signing_secret.startswith("whsec_")
    assert hooks.retrieve(made.id).url == receiver.url
    assert [endpoint.id for endpoint in hooks.list().data] == [made.id]
    assert hooks.update(made.id, name="other").name == "other"
    hooks.test(made.id, event_type="image.job.succeeded")
    receiver.until(1)
    assert json.loads(receiver.came[0][1])["data"]["test"] is True
    assert hooks.rotate_secret(made.id).signing_secret != made.signing_secret
    assert hooks.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        hooks.retrieve(made.id)


def test_endpoints_that_lead_inside_are_refused_and_not_contacted(
    shared_service: Any, receiver: Receiver
) -> None:
    client = shared_service.http()
    for url in (receiver.url, "https://127.0.0.1/x", "https://[::1]/", "https://2130706433/"):
        body = {"url": url, "event_types": ["image.job.succeeded"]}
        answer = client.post(ENDPOINTS, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "url"), url
    # A name is resolved when it is used: it is refused then, for good, and the log says why.
    body = {"url": "https://localhost/hook", "event_types": ["image.job.succeeded"]}
    assert client.post(ENDPOINTS, json=body).status_code == 200
    submit(shared_service)
    [delivery] = settled(shared_service, "failed")
    assert "not public" in delivery["attempts"][0]["error"]
    assert receiver.came == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "url"),
        ({"url": "https://example.com"}, "event_types"),
        ({"url": "https://example.com", "event_types": []}, "event_types"),
        ({"url": "https://example.com", "event_types": ["x"]}, "event_types[0]"),
        ({"url": "https://example.com", "event_types": ["image.job.failed"], "x": 1}, "x"),
    ],
)
def test_a_bad_endpoint_is_named(shared_service: Any, body: dict[str, Any], param: str) -> None:
    answer = shared_service.http().post(ENDPOINTS, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_another_teams_hooks_are_not_there(hooked: Any, receiver: Receiver) -> None:
    endpoint = register(hooked, receiver, "image.job.succeeded")
    submit(hooked)
    [delivery] = settled(hooked, "delivered")
    stranger, _ = hooked.database.api_keys.create(team="strangers")
    client = hooked.http(stranger)
    path = f"{ENDPOINTS}/{endpoint['id']}"
    calls = [
        *(("GET", path), ("POST", path), ("DELETE", path), ("POST", f"{path}/rotate_secret")),
        *(("POST", f"{path}/test"), ("GET", f"/v1/webhook_deliveries/{delivery['id']}")),
        ("POST", f"/v1/webhook_deliveries/{delivery['id']}/redeliver"),
    ]
    for method, where in calls:
        assert client.request(method, where).status_code == 404, where
    assert client.get("/v1/webhook_deliveries").json()["data"] == []
    assert client.get(ENDPOINTS).json()["data"] == []
