"""One trace from the gateway to each denoise step, as a collector gets it from all processes."""

from __future__ import annotations

import http.server
import json
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

pytestmark = pytest.mark.slow

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PROMPT = "a very particular red circle"


class Collector:
    """Takes spans over OTLP/HTTP."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.raw = b""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                outer.take(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, body: bytes) -> None:
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        {
                            "name": span.name,
                            "trace": span.trace_id.hex(),
                            "id": span.span_id.hex(),
                            "parent": span.parent_span_id.hex(),
                        }
                    )

    def of(self, trace_id: str) -> dict[str, list[dict[str, Any]]]:
        """Span name -> spans of the trace."""
        found: dict[str, list[dict[str, Any]]] = {}
        for span in list(self.spans):
            if span["trace"] == trace_id:
                found.setdefault(span["name"], []).append(span)
        return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def test_a_request_is_one_trace_in_all_processes(
    collector: Collector,
    start: Callable[..., Any],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    with start(tmp_path) as running, running.http() as client:
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
        names = ("POST /v1/images/generations", "judge prompt", "draw", "judge and store")
        running.wait_for(lambda: set(names) <= set(collector.of(trace_id)), "all spans came", 60)
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
