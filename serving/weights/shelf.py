"""Adapters that passed their acceptance set, in a folder that a service reads as manifests.

``NAME.yaml`` is the LoRAAdapter that serves; ``NAME/`` has the file and the report of every
revision, named by digest, and ``history.json``, which says in what order they served. Each change
is one rename, so that a reader sees the revision before it or the one after it.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from dataclasses import dataclass

import yaml

from calotype.serving.config import LoRAAdapter
from calotype.serving.core.errors import Conflict, NotFound, StorageFailed
from calotype.serving.core.json_object import JsonObject

FOLDER = "adapters"
"""Of a service's data folder."""
_HISTORY = "history.json"


@dataclass(frozen=True, slots=True)
class Shelved:
    """A revision of an adapter."""

    name: str
    model: str
    sha256: str
    team: str
    """Name of the team that may use it."""
    trigger_words: tuple[str, ...] = ()


class Shelf:
    """Args:
    folder: of all adapters; made when the first one comes.

    Raises (every method that writes):
        StorageFailed: the folder cannot be written.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    def revisions(self, name: str) -> list[str]:
        """sha256 of those that have served, the present one last. Raises NotFound."""
        return _served(self._history(name))

    def holds(self, name: str, sha256: str) -> bool:
        """Whether this revision has ever been promoted here."""
        return (self._folder / name / f"{sha256}.safetensors").exists()

    def promote(self, revision: Shelved, file: pathlib.Path, report: JsonObject | None) -> None:
        """Lets a file serve under a name, in the place of the revision before it."""
        place = self._folder / revision.name
        try:
            place.mkdir(parents=True, exist_ok=True)
            partial = place / f"{revision.sha256}.part"
            shutil.copyfile(file, partial)
            if report is not None:
                _write(place / f"{revision.sha256}.json", json.dumps(report, indent=1))
            partial.rename(place / f"{revision.sha256}.safetensors")
            history = self._known(revision.name)
            served = [sha for sha in _served(history) if sha != revision.sha256]
            history |= {
                "model": revision.model,
                "team": revision.team,
                "triggerWords": list(revision.trigger_words),
                "served": [*served, revision.sha256],
            }
            self._serve(revision.name, history)
        except OSError as error:
            raise StorageFailed(f"{place} cannot be written: {error.strerror}.") from error

    def rollback(self, name: str) -> str:
        """Lets the revision before the present one serve; its sha256.

        Raises:
            NotFound: there is no such adapter.
            Conflict: there is no revision before it.
        """
        history = self._history(name)
        served = _served(history)
        if len(served) < 2:
            raise Conflict(
                f"The adapter {name} has served with one revision only, {served[-1][:12]}: there "
                "is none to go back to. Remove its manifest to stop serving it.",
                code="no_earlier_revision",
            )
        history["served"] = [served[-1], *served[:-1]]
        try:
            self._serve(name, history)
        except OSError as error:
            raise StorageFailed(f"{self._folder} cannot be written: {error.strerror}.") from error
        return served[-2]

    def _serve(self, name: str, history: JsonObject) -> None:
        place = self._folder / name
        sha256 = _served(history)[-1]
        manifest = {
            "apiVersion": "calotype.dev/v1alpha1",
            "kind": "LoRAAdapter",
            "metadata": {"name": name},
            "spec": {
                "modelRef": {"name": history["model"]},
                "source": {"path": str((place / f"{sha256}.safetensors").resolve())},
                "sha256": sha256,
                "triggerWords": history["triggerWords"],
                "access": {"teams": [history["team"]]},
            },
        }
        LoRAAdapter.model_validate(manifest)
        _write(place / _HISTORY, json.dumps(history, indent=1))
        _write(self._folder / f"{name}.yaml", yaml.safe_dump(manifest, sort_keys=False))

    def _history(self, name: str) -> JsonObject:
        found = self._known(name)
        if not found["served"]:
            raise NotFound(f"{self._folder} has no adapter {name!r}.")
        return found

    def _known(self, name: str) -> JsonObject:
        try:
            found: JsonObject = json.loads((self._folder / name / _HISTORY).read_text())
        except FileNotFoundError:
            return {"served": []}
        return found


def _served(history: JsonObject) -> list[str]:
    return [str(sha256) for sha256 in history["served"]]


def _write(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    os.replace(partial, path)
