"""Runs the trainings of a service, one at a time: leases one, trains, measures, writes the end.

The trainer and the acceptance set are commands in child processes, so that a crash, a full memory
or a leak of one is not the worker's. What the trainer tells in its folder is stored with the next
beat. The folder outlives both: whoever leases the training again goes on from its checkpoint.

While pictures of the model wait or are drawn, a child is stopped (SIGSTOP) where the model's
profile says that trainings yield; stopped time is not charged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from calotype.serving.core.errors import CalotypeError, EngineError, NotFound, StorageFailed
from calotype.serving.core.json_object import JsonObject
from calotype.serving.core.protocols import BlobStore
from calotype.serving.database.blob_refs import JOB_INPUT
from calotype.serving.database.database import Database
from calotype.serving.database.training.training_records import Order, Result, TrainingRecord
from calotype.serving.database.training.trainings import LeaseLost
from calotype.serving.jobs.records import FileRecord, new_id
from calotype.serving.storage import new_key
from calotype.serving.weights.shelf import Shelf, Shelved
from calotype.serving.wire.training_progress import read_events

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
BEAT_SECONDS = 2.0
IDLE_SECONDS = 2.0
STOPPED = 130
"""Exit status of a trainer that was asked to stop, and left a checkpoint."""
REFUSED = 1
"""Exit status of an acceptance set that was not passed."""
MOST_CRASHES = 3
_OURS = frozenset({"started", "resumed", "suspended", "succeeded", "failed"})
"""Types that the database writes itself, when it is so."""


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """A model of this machine.

    Attributes:
        place: as ``--model`` of the commands names it.
        yields: trainings pause while its pictures are asked for.
    """

    name: str
    place: str
    yields: bool = True


class Child(Protocol):
    """A command that runs; `subprocess.Popen` is one."""

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int) -> None: ...


Spawn = Callable[[Sequence[str], pathlib.Path], Child]
"""Starts ``calotype ARGUMENTS``; its output goes to the file."""


def spawn_command(arguments: Sequence[str], log_file: pathlib.Path) -> Child:
    with log_file.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "calotype.serving", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


class TrainingWorker:
    """Args:
    models: those that are trained here, by name.
    folder: of the runs, a folder for each.
    shelf: of adapters that serve.
    """

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        models: Mapping[str, TrainableModel],
        folder: pathlib.Path,
        shelf: Shelf,
        spawn: Spawn = spawn_command,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._database, self._blobs, self._models = database, blobs, models
        self._trainings, self._clock = database.trainings, database.clock
        self._folder, self._shelf = folder, shelf
        self._spawn, self._sleep = spawn, sleep
        self.stopping = threading.Event()
        """Set: what runs is left at its next checkpoint, and `run` returns."""

    def run(self) -> None:
        """Until `stopping` is set. A store that is away is waited for."""
        while not self.stopping.is_set():
            try:
                busy = self.step()
                self.serve_promoted()
                if not busy:
                    self._sleep(IDLE_SECONDS)
            except StorageFailed as error:
                log.warning("trainings wait: %s", error.message)
                self._sleep(IDLE_SECONDS)

    def step(self) -> bool:
        """Leases one training and runs it until it ends, waits again or is lost; False = none."""
        record = self._trainings.lease(list(self._models), LEASE_SECONDS)
        if record is None:
            return False
        try:
            self._run(record)
        except LeaseLost as error:
            log.warning("%s", error.message)
        except StorageFailed:
            raise  # the lease runs out, and the training is taken up again
        except CalotypeError as error:
            self._trainings.finish(record.id, record.fence, error)
        return True

    def serve_promoted(self) -> None:
        """Puts every adapter that was promoted on the shelf, once: a rollback stays."""
        for record in self._trainings.to_serve(list(self._models)):
            digest = record.adapter_sha256
            if digest is None or record.adapter_file_id is None:
                continue
            if self._shelf.holds(record.name, digest):
                continue
            file = self._file(record.adapter_file_id, record.team_id)
            path = self._folder / f"{digest}.part"
            with path.open("wb") as written:
                for part in self._blobs.open(file.blob_key).parts:
                    written.write(part)
            trigger = record.settings.get("trigger_word")
            words = (str(trigger),) if trigger else ()
            team = self._database.teams.get_team(record.team_id)
            owner = team.name if team is not None else record.team_id
            self._shelf.promote(
                Shelved(record.name, record.model, digest, owner, words), path, record.acceptance
            )
            path.unlink()

    def _run(self, record: TrainingRecord) -> None:
        work = self._folder / record.id
        work.mkdir(parents=True, exist_ok=True)
        data, adapter = self._fetch(record, work), work / "adapter.safetensors"
        if not adapter.exists():
            status = self._to_its_end(record, self._train_arguments(record, work, data), work)
            if status is None:
                return
            if status != 0:
                self._crashed(record, work, status)
                return
        report = work / "acceptance.json"
        arguments = self._acceptance_arguments(record, work, data, adapter, report)
        if arguments is not None:
            status = self._to_its_end(record, arguments, work)
            if status is None:
                return
            if status not in (0, REFUSED) or not report.exists():
                raise EngineError(
                    f"The acceptance set could not be measured: {_last_line(work)}",
                    code="acceptance_failed",
                )
        self._trainings.finish(record.id, record.fence, self._result(record, adapter, report))

    def _to_its_end(
        self, record: TrainingRecord, arguments: Sequence[str], work: pathlib.Path
    ) -> int | None:
        """The exit status of a command; None where it was stopped, which is written down then.

        Raises:
            EngineError: the budget is spent.
        """
        order, status = self._attend(record, arguments, work)
        if order == "cancel":
            self._trainings.finish(record.id, record.fence, None)
            return None
        if order == "stop":
            raise EngineError(
                f"The budget of {record.budget_seconds:.0f} device seconds is spent. Create the "
                "training again with a larger one; this one's last checkpoint is kept.",
                code="budget_exhausted",
                param="budget_seconds",
            )
        if order == "suspend" or self.stopping.is_set():
            self._trainings.give_back(record.id, record.fence)
            return None
        return status

    def _attend(
        self, record: TrainingRecord, arguments: Sequence[str], work: pathlib.Path
    ) -> tuple[Order, int]:
        """Runs a command to its end, beating; what was ordered last, and its exit status."""
        model = self._models[record.model]
        progress = self._trainings.get_training(record.id).progress
        known = int(progress.get("sequence", 0))
        child = self._spawn(arguments, work / "log.txt")
        order: Order = "run"
        asked = paused = False
        seen = self._clock.monotonic()
        try:
            while True:
                status = child.poll()
                now = self._clock.monotonic()
                used, seen = 0.0 if paused else now - seen, now
                events: list[tuple[str, JsonObject]] = []
                for event in read_events(work, known):
                    known = event.sequence
                    told = event.model_dump(mode="json", exclude_none=True, exclude={"type"})
                    events.append((event.type, told))
                found = self._trainings.beat(
                    *(record.id, record.fence, LEASE_SECONDS, used),
                    [one for one in events if one[0] not in _OURS],
                )
                # What was ordered first is carried out: a resume cannot take back a stop.
                order = found if order == "run" else order
                if status is not None:
                    return order, status
                ends = order != "run" or self.stopping.is_set()
                pause = not ends and model.yields and self._trainings.model_is_asked(model.name)
                if pause != paused:
                    child.send_signal(signal.SIGSTOP if pause else signal.SIGCONT)
                    paused = pause
                if ends and not asked:
                    child.send_signal(signal.SIGTERM)
                    asked = True
                self._sleep(BEAT_SECONDS)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)

    def _acceptance_arguments(
        self,
        record: TrainingRecord,
        work: pathlib.Path,
        data: pathlib.Path,
        adapter: pathlib.Path,
        report: pathlib.Path,
    ) -> list[str] | None:
        """None: it is measured already, or nothing is to be."""
        acceptance = record.settings.get("acceptance")
        if acceptance is None or report.exists():
            return None
        spec = work / "acceptance-spec.json"
        spec.write_text(json.dumps(acceptance))
        return ["adapters", "accept", str(adapter), "--name", record.name,
                "--model", self._models[record.model].place, "--dataset", str(data),
                "--trigger", str(record.settings["trigger_word"]), "--spec", str(spec),
                "--html", str(report.with_suffix(".html")), "--json", str(report)]  # fmt: skip

    def _result(
        self, record: TrainingRecord, adapter: pathlib.Path, report: pathlib.Path
    ) -> Result:
        page = report.with_suffix(".html")
        return Result(
            self._keep(record, adapter, "application/octet-stream"),
            _sha256(adapter),
            json.loads(report.read_text()) if report.exists() else None,
            self._keep(record, page, "text/html") if page.exists() else None,
        )

    def _crashed(self, record: TrainingRecord, work: pathlib.Path, status: int) -> None:
        """A refusal is final; a trainer that was killed is started again from its checkpoint."""
        failed = next((e for e in reversed(list(read_events(work))) if e.type == "failed"), None)
        if status > 0 and failed is not None and failed.error is not None:
            error = failed.error
            raise EngineError(str(error["message"]), str(error["code"]), error.get("param"))
        if status < 0 and record.fence < MOST_CRASHES:
            self._trainings.give_back(record.id, record.fence)
            return
        raise EngineError(
            f"The trainer ended with status {status}: {_last_line(work)}", code="training_failed"
        )

    def _train_arguments(
        self, record: TrainingRecord, work: pathlib.Path, data: pathlib.Path
    ) -> list[str]:
        settings = record.settings
        found = ["train", "lora", str(data), "--model", self._models[record.model].place,
                 "--work", str(work), "-o", str(work / "adapter.safetensors"),
                 "--price-per-hour", str(record.price * 3600)]  # fmt: skip
        for name, option in _OPTIONS.items():
            if settings.get(name) is not None:
                found += [option, str(settings[name])]
        for option, values in (
            ("--class-word", settings.get("class_words") or ()),
            ("--sample", settings.get("sample_prompts") or ()),
        ):
            for value in values:
                found += [option, str(value)]
        if settings.get("style"):
            found.append("--style")
        return found

    def _fetch(self, record: TrainingRecord, work: pathlib.Path) -> pathlib.Path:
        """The data set's archive, in the run's folder."""
        dataset = self._database.datasets.get_dataset(record.dataset_id, record.team_id)
        file = self._file(dataset.file_id, record.team_id)
        suffix = "".join(pathlib.PurePath(file.filename).suffixes[-2:]) or ".zip"
        path = work / f"dataset{suffix}"
        if not path.exists():
            partial = path.with_name(path.name + ".part")
            with partial.open("wb") as written:
                for part in self._blobs.open(file.blob_key).parts:
                    written.write(part)
            partial.rename(path)
        return path

    def _file(self, file_id: str, team_id: str) -> FileRecord:
        file = self._database.files.get_file(file_id, team_id)
        if file is None:
            raise NotFound(f"The file '{file_id}' was deleted.", param="dataset")
        return file

    def _keep(self, record: TrainingRecord, path: pathlib.Path, content_type: str) -> str:
        """A file of the run in the object store; its id."""
        key = new_key(record.team_id, path.read_bytes(), path.suffix.lstrip("."))
        self._blobs.put_parts(key, _parts(path))
        file = FileRecord(
            id=new_id("file"),
            team_id=record.team_id,
            purpose=JOB_INPUT,
            filename=f"{record.name}{path.suffix}",
            content_type=content_type,
            size=path.stat().st_size,
            sha256=_sha256(path),
            blob_key=key,
            created=self._clock.time(),
            expires=None,
        )
        self._database.files.add_file(file)
        return file.id


_OPTIONS = {
    "trigger_word": "--trigger",
    "preset": "--preset",
    "steps": "--steps",
    "resolution": "--resolution",
    "rank": "--rank",
    "batch": "--batch",
    "learning_rate": "--learning-rate",
    "seed": "--seed",
    "sample_every": "--sample-every",
    "checkpoint_every": "--checkpoint-every",
    "holdout": "--holdout",
    "duplicates_within": "--duplicates-within",
    "basis": "--rights",
    "holder": "--holder",
    "licence": "--licence",
    "evidence": "--evidence",
    "expires": "--expires",
}
"""Settings of a training -> options of ``calotype train lora``."""


def _parts(path: pathlib.Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            yield part


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(work: pathlib.Path) -> str:
    """What a command said last."""
    with contextlib.suppress(OSError):
        with (work / "log.txt").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            lines = file.read().decode(errors="replace").strip().splitlines()
        if lines:
            return lines[-1].removeprefix("calotype: ")[:500]
    return "it said nothing."
