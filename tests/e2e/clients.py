"""Clients of product teams that go on while the service is disturbed."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import Any, Self

import httpx

OPEN = 3
"""Jobs that a team has open at once."""
LONG = {"width": 208, "height": 208, "steps": 50, "sampler": "flow-heun"}
"""Takes long enough to leave checkpoints."""
SHORT = {"width": 64, "height": 64, "steps": 4}
PATIENCE = 1200.0
"""Seconds for a gateway that was killed to answer again."""


class _Client:
    """A key, a connection, and a thread that works until it is told to stop."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=300)
        self._stopped, self._given_up = threading.Event(), threading.Event()
        self._failed: list[BaseException] = []
        self._work = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._work.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._given_up.set()
        self._stopped.set()
        self._work.join()
        self._client.close()

    def stop(self) -> None:
        """Waits for what is under way. Raises what the thread met."""
        self._stopped.set()
        self._work.join()
        if self._failed:
            raise self._failed[0]

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self.work()
        except BaseException as error:
            self._failed.append(error)

    def work(self) -> None:
        """One round."""
        raise NotImplementedError


class Team(_Client):
    """Sends jobs as long as few of its own are open; what was not answered it sends again."""

    def __init__(self, url: str, name: str, key: str) -> None:
        super().__init__(url, key)
        self.name, self.accepted = name, list[str]()

    def work(self) -> None:
        if self._open() >= OPEN:
            time.sleep(0.2)
            return
        number = len(self.accepted)
        kind = SHORT if number % 3 else LONG
        body = {"input": {"prompt": "a red circle", "seed": number, **kind}}
        name = f"{self.name}-{number}"
        answer = self._insist("POST", "/v1/jobs", json=body, headers={"idempotency-key": name})
        self.accepted.append(answer["id"])

    def again(self, recipe: Any) -> bytes:
        """The file that a recipe gives when nobody disturbs it."""
        answer = self._client.post(
            "/v1/images/generations", json={"recipe": recipe, "response_format": "url"}
        )
        assert answer.status_code == 200, answer.text
        return httpx.get(answer.json()["data"][0]["url"], timeout=60).content

    def _open(self) -> int:
        found = self._insist("GET", "/v1/jobs", params={"limit": 20})["data"]
        return sum(job["status"] in ("queued", "running") for job in found)

    def _insist(self, method: str, path: str, **told: Any) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                answer = self._client.request(method, path, **told)
                if answer.status_code in (200, 202):
                    return dict(answer.json())
                assert answer.status_code in (429, 503), answer.text
            except httpx.TransportError:
                pass
            assert time.monotonic() < end, "the gateway never came back"
            assert not self._given_up.is_set(), "the test ended before the gateway came back"
            time.sleep(0.1)


@dataclass(frozen=True)
class Asked:
    """A request for a picture; times are of the monotonic clock, in seconds."""

    began: float
    ended: float
    status: int
    """200, an error's status code, or 0 where the connection broke."""


class Asking(_Client):
    """Somebody who waits for each picture, and asks for the next one whatever came."""

    def __init__(self, url: str, key: str) -> None:
        super().__init__(url, key)
        self.asked = list[Asked]()

    def drawn_since(self, moment: float) -> Asked | None:
        """The first picture that was asked for after a moment and came."""
        return next((one for one in self.asked if one.began >= moment and one.status == 200), None)

    def refused_since(self, moment: float) -> set[int]:
        return {one.status for one in self.asked if one.ended >= moment} - {200}

    def work(self) -> None:
        body = {"prompt": "a red circle", "n": 2, "steps": 10, "seed": len(self.asked)}
        began, status = time.monotonic(), 0
        with contextlib.suppress(httpx.TransportError):  # the gateway itself was killed
            status = self._client.post("/v1/images/generations", json=body).status_code
        self.asked.append(Asked(began, time.monotonic(), status))
        if status != 200:
            time.sleep(0.2)
