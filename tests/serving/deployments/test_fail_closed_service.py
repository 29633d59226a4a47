"""Every way in which a classifier can fail, one at a time, through gateway, dispatcher and engine.

Nothing is served that was not checked, for no team and under no policy; the service recovers alone.
A classifier on trial that fails in the same ways fails nobody.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest

from calotype.moderation.classifiers import Scores
from calotype.moderation.errors import ClassifierUnavailable
from calotype.moderation.evaluation.shadow import Shadows
from calotype.moderation.moderator import Moderator
from calotype.moderation.policy.policy import Policy
from calotype.serving.api.app import create_app
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.config import ImageModel, ImageModelSpec, Metadata, Source
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.deployments.local import InProcessSafety, LocalBackend
from calotype.serving.dispatch.policy import DispatchPolicy
from calotype.serving.jobs.moderation_checks import CheckRetries
from calotype.serving.testing.in_memory import MemoryBlobStore
from calotype.serving.testing.models import save_tiny_flux2

pytestmark = pytest.mark.slow

FAILURES = ("killed", "hung", "nan", "raising", "missing", "memory")
SECONDS = 2.0
"""Of the policies, for a check."""
WORKER = "import sys\nfor line in sys.stdin:\n    print(0.1, flush=True)\n"
RULES = {"sexual": {"text": {"block": 0.5}, "image": {"block": 0.5}}}


class Faulty:
    """Asks a process of its own, and fails as it is told to, until it is told not to."""

    def __init__(self, name: str, weights: pathlib.Path) -> None:
        self.name, self.failure = name, ""
        self._weights, self._release = weights, threading.Event()
        self._process: subprocess.Popen[str] | None = None
        weights.write_text("weights")

    def fail(self, failure: str) -> None:
        self.failure = failure
        self._release.clear()
        if failure == "missing":
            self._weights.rename(self._weights.with_suffix(".away"))

    def recover(self) -> None:
        if self.failure == "missing":
            self._weights.with_suffix(".away").rename(self._weights)
        self.failure = ""
        self._release.set()

    def end(self) -> None:
        self._release.set()
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def score(self, inputs: Sequence[Any]) -> list[Scores]:
        if not self._weights.exists():
            raise ClassifierUnavailable(f"Classifier {self.name} has no file {self._weights}.")
        if self.failure == "hung":
            self._release.wait()
            return [{"sexual": 0.1} for _ in inputs]
        if self.failure == "raising":
            raise RuntimeError("out of order")
        if self.failure == "memory":
            np.empty(2**60, dtype=np.uint8)
        value = float("nan") if self.failure == "nan" else self._asked()
        return [{"sexual": value} for _ in inputs]

    def _asked(self) -> float:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        if self.failure == "killed":
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print("look", file=self._process.stdin, flush=True)
            return float(self._process.stdout.readline())
        except (OSError, ValueError):
            self._process.communicate()
            self._process = None  # the next call starts another one
            raise


@dataclass
class House:
    clients: dict[str, httpx.AsyncClient]
    """Team -> the API as it sees it."""
    blobs: MemoryBlobStore
    database: Database
    deciding: dict[str, Faulty]
    """``input`` and ``output``: the classifier of that stage."""
    on_trial: dict[str, Faulty]
    shadows: Shadows
    log: pathlib.Path

    async def draw(self, team: str) -> httpx.Response:
        wanted = {"prompt": "a red circle", "size": "64x64", "steps": 1, "seed": 7}
        return await self.clients[team].post("/v1/images/generations", json=wanted)

    def trials(self) -> list[dict[str, Any]]:
        """What the classifiers on trial said since the last call."""
        self.shadows.wait()
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_flux2(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def classifiers(tmp_path: pathlib.Path) -> Iterator[Callable[[str], Faulty]]:
    made: list[Faulty] = []

    def make(name: str) -> Faulty:
        made.append(Faulty(name, tmp_path / f"{name}.weights"))
        return made[-1]

    yield make
    for classifier in made:
        classifier.end()


@pytest.fixture
async def house(
    model: pathlib.Path,
    tmp_path: pathlib.Path,
    classifiers: Callable[[str], Faulty],
) -> AsyncIterator[House]:
    once = CheckRetries(delays=())
    base = {"version": 1, "categories": RULES, "timeoutSeconds": SECONDS}
    trial = [
        {"classifier": name, "model": f"/models/{name}", "sample": 1.0}
        for name in ("qwen3guard", "falconsai")
    ]
    kids = {**base, "terms": [{"category": "ip_character", "terms": ["captain calotype"]}]}
    deciding = {"input": classifiers("text"), "output": classifiers("image")}
    on_trial = {"input": classifiers("qwen3guard"), "output": classifiers("falconsai")}
    stage = Moderator(
        Policy.from_spec("house", base),
        text_classifiers=[deciding["input"]],
        image_classifiers=[deciding["output"]],
    )
    stage.reconfigure(
        stage.policy,
        {
            "kids": Policy.from_spec("kids", kids),
            "tried": Policy.from_spec("tried", {**kids, "shadow": trial}),
        },
    )
    log = tmp_path / "shadow" / "shadow-one.jsonl"
    stage.shadows = Shadows(
        log, load=lambda rules: {f.name: f for f in on_trial.values()}[rules.classifier].score
    )
    resource = ImageModel(
        metadata=Metadata(name="tiny"),
        spec=ImageModelSpec(source=Source(path=str(model)), precision="float32", device="cpu"),
    )
    database, blobs = Database.open(sqlite_url(tmp_path)), MemoryBlobStore()
    backend = LocalBackend(
        resource,
        [],
        database,
        blobs,
        InProcessSafety(stage),
        DispatchPolicy(check_retries=once, max_outage_seconds=0),
    )
    app = create_app(GatewaySettings(), database, blobs, backend, Catalog([resource]))
    clients = {}
    for team, policy in (("plain", None), ("kids", "kids"), ("tried", "tried")):
        database.teams.set_team(team, policy=policy)
        clients[team] = httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://test",
            headers={"authorization": f"Bearer {database.api_keys.create(team=team)[0]}"},
            timeout=600,
        )
    async with backend.running():
        yield House(clients, blobs, database, deciding, on_trial, stage.shadows, log)
    for client in clients.values():
        await client.aclose()
    database.close()


@pytest.mark.parametrize("side", ["input", "output"])
async def test_nothing_passes_a_classifier_that_fails(house: House, side: str) -> None:
    answered: list[tuple[str, str, int, str]] = []
    for failure in FAILURES:
        for team in house.clients:
            kept = set(house.blobs.blobs)
            house.deciding[side].fail(failure)
            refused = await house.draw(team)
            code = refused.json().get("error", {}).get("code", "")
            answered.append((failure, team, refused.status_code, code))
            assert set(house.blobs.blobs) == kept, "no picture is stored"
            house.deciding[side].recover()
            again = await house.draw(team)
            assert again.status_code == 200, f"{failure}, {team}: {again.text}"
    assert len(answered) == len(FAILURES) * 3
    wrong = [row for row in answered if row[2:] != (503, "moderation_unavailable")]
    assert wrong == []
    assert not [
        *house.database.jobs.open_jobs(None, "queued"),
        *house.database.jobs.open_jobs(None, "running"),
    ]


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_classifier_on_trial_fails_nobody(house: House, failure: str) -> None:
    for faulty in house.on_trial.values():
        faulty.fail(failure)
    assert (await house.draw("tried")).status_code == 200
    told = house.trials()
    assert {entry["classifier"] for entry in told} == {"qwen3guard", "falconsai"}
    assert all("error" in entry and "would" not in entry for entry in told)
    for faulty in house.on_trial.values():
        faulty.recover()
    assert (await house.draw("tried")).status_code == 200
    assert {entry["would"] for entry in house.trials()} == {"ALLOW"}
    assert (await house.draw("kids")).status_code == 200
    assert house.trials() == [], "only where the policy asks for it"


async def test_a_team_whose_policy_is_not_there_draws_nothing(house: House) -> None:
    house.database.teams.set_team("plain", policy="gone")
    refused = await house.draw("plain")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "moderation_unavailable")
    assert not house.blobs.blobs
    house.database.teams.set_team("plain", policy="kids")
    assert (await house.draw("plain")).status_code == 200
