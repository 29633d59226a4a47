"""One trace from the gateway to each denoise step, as a collector gets it from all processes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from servers.trace_collector import Collector

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PROMPT = "a very particular red circle"


def test_a_request_is_one_trace_in_all_processes(service: Any, collector: Collector) -> None:
    with service.http() as client:
        answer = client.post(
            "/v1/images/generations",
            json={"prompt": PROMPT, "steps": 5},
            headers={"traceparent": PARENT},
        )
        assert answer.status_code == 200, answer.text
        trace_id = PARENT.split("-")[1]
        assert answer.headers["x-trace-id"] == trace_id
        job = client.get(f"/v1/jobs/{answer.json()['job_id']}").json()
        assert job["trace_id"] == trace_id
        assert "traceparent" not in json.dumps(job["input"])
        names = ("POST /v1/images/generations", "check prompt", "draw", "check and store")
        service.wait_for(lambda: set(names) <= set(collector.of(trace_id)), "all spans came")
        found = collector.of(trace_id)
        other = client.get("/v1/models").headers["x-trace-id"]
        assert other != trace_id and len(other) == 32
    [request], [draw], [denoise] = (found[n] for n in (names[0], "draw", "denoise"))
    assert request["parent"] == PARENT.split("-")[2]
    assert draw["parent"] == request["id"] and denoise["parent"] == draw["id"]
    steps = found["denoise step"]
    assert len(steps) == 5 and {step["parent"] for step in steps} == {denoise["id"]}
    assert PROMPT.encode() not in collector.raw
    assert b"ct_live" not in collector.raw
