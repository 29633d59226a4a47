"""The worker of trainings, with commands that are played: what it starts, stops and writes down."""

from __future__ import annotations

import io
import json
import pathlib
import signal
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from calotype.serving.cluster.training_worker import TrainableModel, TrainingWorker
from calotype.serving.config import read_manifests
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.database.training.datasets import DatasetRecord
from calotype.serving.database.training.training_records import TrainingRecord
from calotype.serving.jobs.records import FileRecord
from calotype.serving.testing.in_memory import ManualClock, MemoryBlobStore
from calotype.serving.weights.shelf import Shelf
from calotype.serving.wire.training_progress import EVENTS_FILE


@dataclass
class Played:
    """A child that ends after so many looks, or when it is told to."""

    arguments: Sequence[str]
    looks: int
    status: int
    on_end: Callable[[Sequence[str]], None]
    stops_with: int = 130
    signals: list[int] = field(default_factory=list)

    def poll(self) -> int | None:
        self.looks -= 1
        if signal.SIGTERM in self.signals:
            return self.stops_with
        if self.looks > 0:
            return None
        if self.looks == 0:
            self.on_end(self.arguments)
        return self.status

    def send_signal(self, sig: int) -> None:
        self.signals.append(sig)


class World:
    """A service's store with one training, and a worker over it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.clock = folder, ManualClock(1000.0)
        self.database = Database.open(sqlite_url(folder), self.clock)
        self.blobs = MemoryBlobStore()
        self.children: list[Played] = []
        self.status, self.looks = 0, 3
        self.outcome = "promoted"
        self.during: Callable[[], None] = lambda: None
        self.shelf = Shelf(folder / "adapters")
        self.worker = TrainingWorker(
            self.database,
            self.blobs,
            {"shapes": TrainableModel("shapes", "shapes")},
            folder / "runs",
            self.shelf,
            self.spawn,
            self.sleep,
        )
        self.team = self.database.teams.ensure_team("acme").id

    def add(self, number: int = 1, **settings: object) -> str:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("a.png", b"picture")
        self.blobs.put(f"blob-{number}", data.getvalue())
        file = FileRecord(
            *(f"file_{number}", self.team, "job_input", "set.zip", "application/zip"),
            *(len(data.getvalue()), "aa" * 32, f"blob-{number}", 1000.0, None),
        )
        self.database.files.add_file(file)
        dataset = DatasetRecord(
            *(f"dataset_{number}", self.team, "set", file.id, "aa" * 32, {}, "ready", 1000.0)
        )
        self.database.datasets.add_dataset(dataset)
        record = TrainingRecord(
            *(f"training_{number}", self.team, "key_1", "shapes", "zorbl", dataset.id),
            {"trigger_word": "zorbl", "steps": 7, "acceptance": {"pictures": 8}} | settings,
            1000.0 + number,
            price=0.5,
            budget_seconds=settings.pop("budget", None),  # type: ignore[arg-type]
        )
        self.database.trainings.add_training(record)
        return record.id

    def spawn(self, arguments: Sequence[str], log_file: pathlib.Path) -> Played:
        log_file.write_text("calotype: The last words.\n")
        child = Played(arguments, self.looks, self.status, self.ended)
        self.children.append(child)
        return child

    def ended(self, arguments: Sequence[str]) -> None:
        """What a command leaves when it ends well."""
        if arguments[0] == "train" and self.status == 0:
            pathlib.Path(value(arguments, "-o")).write_bytes(b"adapter %d" % len(self.children))
        if arguments[0] == "adapters":
            report = pathlib.Path(value(arguments, "--json"))
            report.write_text(json.dumps({"outcome": self.outcome, "gates": []}))
            report.with_suffix(".html").write_text("<html>")

    def sleep(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.during()

    def tell(self, name: str, *events: JsonObject) -> None:
        folder = self.folder / "runs" / name
        with (folder / EVENTS_FILE).open("a") as file:
            for number, event in enumerate(events, start=1):
                file.write(json.dumps({"sequence": number, "time": 1.0, **event}) + "\n")

    def get(self, name: str) -> TrainingRecord:
        return self.database.trainings.get_training(name)


def value(arguments: Sequence[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


@pytest.fixture
def world(tmp_path: pathlib.Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.database.close()


def test_a_training_is_trained_measured_charged_and_served(world: World) -> None:
    name = world.add()
    told = {"type": "step", "step": 3, "totalSteps": 7, "loss": 0.25}
    saved = {"type": "checkpoint_saved", "step": 3, "totalSteps": 7, "file": "checkpoints/3"}
    world.during = lambda: world.tell(name, told, saved) if len(world.children) == 1 else None
    assert world.worker.step()
    train, accept = (child.arguments for child in world.children)
    assert train[:2] == ["train", "lora"]
    assert (value(train, "--trigger"), value(train, "--steps")) == ("zorbl", "7")
    assert accept[:2] == ["adapters", "accept"]
    assert value(accept, "--dataset").endswith("dataset.zip")
    record = world.get(name)
    assert (record.status, record.acceptance) == ("succeeded", {"outcome": "promoted", "gates": []})
    assert (record.progress["loss"], len(record.checkpoints)) == (0.25, 1)
    assert record.device_seconds > 0
    file = world.database.files.get_file(record.adapter_file_id or "", world.team)
    assert world.blobs.get(file.blob_key) == b"adapter 1"
    world.worker.serve_promoted()
    manifest = world.folder / "adapters" / "zorbl.yaml"
    (adapter,) = read_manifests([manifest]).adapters
    assert adapter.spec.sha256 == record.adapter_sha256
    assert adapter.spec.access.teams == ["acme"]
    assert not world.worker.step()


def test_a_refused_adapter_does_not_serve(world: World) -> None:
    name = world.add()
    world.outcome = "refused"
    world.worker.step()
    world.worker.serve_promoted()
    assert (world.get(name).status, world.get(name).promoted) == ("succeeded", None)
    assert not list(world.folder.glob("adapters/*.yaml"))


def test_paid_traffic_stops_the_trainer_and_is_not_charged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = world.add()
    busy = iter([True, True, True])
    monkeypatch.setattr(world.database.trainings, "model_is_asked", lambda model: next(busy, False))
    world.looks = 6
    world.worker.step()
    assert world.children[0].signals == [signal.SIGSTOP, signal.SIGCONT]
    looks = 2 * (world.looks - 1)
    assert world.get(name).device_seconds == pytest.approx(2.0 * (looks - 3))


def test_suspend_stops_at_a_checkpoint_and_resume_starts_again(world: World) -> None:
    name = world.add()
    world.looks = 50
    world.during = lambda: world.database.trainings.want(name, world.team, "suspend")
    world.worker.step()
    assert world.children[0].signals == [signal.SIGTERM]
    assert world.get(name).status == "suspended"
    assert not world.worker.step()
    world.during, world.looks = lambda: None, 2
    world.database.trainings.want(name, world.team, "run")
    world.worker.step()
    assert world.get(name).status == "succeeded"
    assert value(world.children[1].arguments, "--work") == value(
        world.children[0].arguments, "--work"
    )


def test_a_cancel_and_a_spent_budget_end_it_for_good(world: World) -> None:
    canceled, poor = world.add(1), world.add(2, budget=3.0)
    world.looks = 50
    world.during = lambda: world.database.trainings.want(canceled, world.team, "cancel")
    world.worker.step()
    world.during = lambda: None
    world.worker.step()
    assert world.get(canceled).status == "canceled"
    record = world.get(poor)
    assert record.status == "failed"
    assert record.error is not None
    assert (record.error["code"], record.error["param"]) == ("budget_exhausted", "budget_seconds")


def test_a_refusal_is_told_with_its_code_and_a_kill_is_tried_again(world: World) -> None:
    wrong = world.add(1)
    world.status = 2
    error = {"code": "dataset_too_small", "message": "set.zip has 3 pictures.", "param": "set.zip"}
    world.during = lambda: world.tell(wrong, {"type": "failed", "error": error})
    world.worker.step()
    found = world.get(wrong).error
    assert found is not None
    assert (found["code"], found["message"]) == (error["code"], error["message"])
    killed = world.add(2)
    world.status, world.during = -9, lambda: None
    for _ in range(3):
        assert world.worker.step()
    found = world.get(killed).error
    assert found is not None
    assert (found["code"], len(world.children)) == ("training_failed", 4)
    assert "The last words." in found["message"]


def test_a_service_that_ends_leaves_the_training_for_the_next(world: World) -> None:
    name = world.add()
    world.looks, world.during = 50, world.worker.stopping.set
    world.worker.step()
    assert (world.get(name).status, world.children[0].signals) == ("queued", [signal.SIGTERM])


def test_a_rollback_serves_the_revision_before_and_is_not_undone(world: World) -> None:
    first, second = world.add(1), world.add(2)
    world.worker.step()
    world.worker.serve_promoted()
    world.worker.step()
    world.worker.serve_promoted()
    digests = [world.get(name).adapter_sha256 for name in (first, second)]
    assert world.shelf.revisions("zorbl") == digests
    assert world.shelf.rollback("zorbl") == digests[0]
    world.worker.serve_promoted()
    (adapter,) = read_manifests([world.folder / "adapters" / "zorbl.yaml"]).adapters
    assert adapter.spec.sha256 == digests[0]
