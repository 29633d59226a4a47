"""Checks uploaded data sets, one after the other; any gateway of a service does.

The archive lies in a temporary file meanwhile. Pictures are decoded beside the event loop, and
checked by the safety stage of the models, as every other picture.
"""

from __future__ import annotations

import asyncio
import logging
import pathlib
import tempfile
from dataclasses import dataclass

from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.decision import CheckScope, Decision
from calotype.serving.core.errors import (
    CalotypeError,
    ModerationUnavailable,
    NotFound,
    StorageFailed,
)
from calotype.serving.database.training.datasets import DatasetRecord
from calotype.serving.training.dataset.archive_check import DatasetSettings, check_archive
from calotype.serving.training.dataset.images.pictures import Pixels
from calotype.serving.training.dataset.report import DatasetReport

log = logging.getLogger(__name__)

CLAIM_SECONDS = 1800.0
"""A gateway that has not ended a check in this time has died over it."""
_PATIENCE_SECONDS = 120.0
"""For one answer of the safety stage."""


@dataclass(frozen=True, slots=True)
class _Screen:
    """The safety stage of the service, asked from a thread. A `dataset.screening.Screen`."""

    gateway: Gateway
    loop: asyncio.AbstractEventLoop
    scope: CheckScope | None
    models: list[str] | None

    def check_prompt(self, text: str) -> Decision:
        return self._decided([text], [])

    def check_image(self, pixels: Pixels, *, prompt: str = "") -> Decision:
        return self._decided([], [pixels])

    def _decided(self, texts: list[str], images: list[Pixels]) -> Decision:
        asked = self.gateway.backend.moderate(texts, images, self.scope, self.models)
        found = asyncio.run_coroutine_threadsafe(asked, self.loop)
        return found.result(_PATIENCE_SECONDS)[0]


class DatasetChecker:
    """Works through data sets that wait for their check."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._datasets = gateway, gateway.database.datasets

    async def work(self, pause: float) -> float:
        """One data set; the pause until the next look.

        Raises:
            CalotypeError: the safety stage or the store is away; the set is checked again later.
        """
        claimed = await asyncio.to_thread(self._datasets.claim_unchecked, CLAIM_SECONDS)
        if claimed is None:
            return pause
        await self._check(claimed)
        return 0.0

    async def _check(self, record: DatasetRecord) -> None:
        gateway = self._gateway
        team = await asyncio.to_thread(gateway.database.teams.get_team, record.team_id)
        scope = CheckScope((team.policy,)) if team is not None and team.policy else None
        models = team.allowed_models if team is not None else None
        screen = _Screen(gateway, asyncio.get_running_loop(), scope, models)
        try:
            report = await asyncio.to_thread(self._read, record, screen)
        except (StorageFailed, ModerationUnavailable, TimeoutError) as error:
            await asyncio.to_thread(self._datasets.release_claim, record.id)
            log.warning("the data set %s is checked later: %r", record.id, error)
            raise
        except CalotypeError as error:
            await asyncio.to_thread(self._datasets.finish_check, record.id, error)
        else:
            await asyncio.to_thread(self._datasets.finish_check, record.id, report.to_payload())

    def _read(self, record: DatasetRecord, screen: _Screen) -> DatasetReport:
        database = self._gateway.database
        file = database.files.get_file(record.file_id, record.team_id)
        if file is None:
            raise NotFound(f"The archive of the data set '{record.id}' is gone.")
        revoked = database.revocations.list_revocations()
        without = frozenset(one.picture_sha256 for one in revoked)
        with tempfile.TemporaryDirectory(prefix="calotype-dataset-") as folder:
            path = pathlib.Path(folder) / "archive"
            with path.open("wb") as archive:
                for part in self._gateway.blobs.open(file.blob_key).parts:
                    archive.write(part)
            settings = DatasetSettings.from_payload(record.settings)
            return check_archive(path, file.filename, settings, screen, without)
