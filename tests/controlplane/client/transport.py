"""How calls reach the API server: one that is asked to come back later does so, as kubectl does."""

import time

import httpx

PATIENCE = 60.0
"""Seconds for which a call is repeated: a restarted API server opens its storage kind by kind."""


class RepeatingTransport(httpx.HTTPTransport):
    """Repeats calls that are answered with 429, after the time that the answer names."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = super().handle_request(request)
            if answer.status_code != 429 or time.monotonic() > deadline:
                return answer
            answer.close()
            time.sleep(min(float(answer.headers.get("retry-after", "1")), 1.0))
