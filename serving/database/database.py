"""The job database: one repository for each kind of record, over one connection pool."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import Engine

from calotype.serving.core.errors import StorageFailed
from calotype.serving.core.protocols import Clock, SystemClock
from calotype.serving.database.accounts.api_keys import ApiKeys
from calotype.serving.database.accounts.service_secrets import ServiceSecrets
from calotype.serving.database.accounts.teams import Teams
from calotype.serving.database.accounts.usage import Usage
from calotype.serving.database.batches import Batches
from calotype.serving.database.blob_refs import BlobRefs
from calotype.serving.database.connection import create_database_engine
from calotype.serving.database.forecasts import Forecasts
from calotype.serving.database.intermediates import Intermediates
from calotype.serving.database.jobs import Jobs
from calotype.serving.database.retention import Retention
from calotype.serving.database.review.audit_heads import AuditHeads
from calotype.serving.database.review.cases import Cases
from calotype.serving.database.review.held_images import HeldImages
from calotype.serving.database.review.image_index import ImageIndex
from calotype.serving.database.review.reviewer_audit import ReviewerAudit
from calotype.serving.database.review.takedowns import Takedowns
from calotype.serving.database.schema.upgrade import upgrade_database
from calotype.serving.database.training.adapter_origins import AdapterOrigins
from calotype.serving.database.training.datasets import Datasets
from calotype.serving.database.training.revocations import Revocations
from calotype.serving.database.training.trainings import Trainings
from calotype.serving.database.webhooks import Webhooks

PATIENCE_SECONDS = 60.0
"""The database of a fresh installation starts at the same time as those who need it."""
PAUSE_SECONDS = 2.0


class Database:
    """Every repository.

    A change that concerns several kinds of record is one transaction: the repository that begins
    it hands its connection to the functions of the other modules.
    """

    def __init__(self, engine: Engine, clock: Clock | None = None) -> None:
        self.engine = engine
        self.clock = clock = clock or SystemClock()
        self.jobs = Jobs(engine, clock)
        self.intermediates = Intermediates(engine, clock)
        self.forecasts = Forecasts(engine, clock)
        self.files = BlobRefs(engine, clock)
        self.teams = Teams(engine, clock)
        self.api_keys = ApiKeys(engine, clock, self.teams)
        self.secrets = ServiceSecrets(engine, clock)
        self.usage = Usage(engine, clock)
        self.webhooks = Webhooks(engine, clock)
        self.batches = Batches(engine, clock)
        self.cases = Cases(engine, clock)
        self.held_images = HeldImages(engine, clock, self.cases)
        self.reviewer_audit = ReviewerAudit(engine, clock)
        self.audit_heads = AuditHeads(engine, clock)
        self.image_index = ImageIndex(engine, clock)
        self.takedowns = Takedowns(engine, clock)
        self.datasets = Datasets(engine, clock)
        self.origins = AdapterOrigins(engine, clock)
        self.revocations = Revocations(engine, clock)
        self.trainings = Trainings(engine, clock)
        self.retention = Retention(engine, clock)

    @classmethod
    def open(cls, url: str, clock: Clock | None = None) -> Database:
        """Upgrades the tables behind ``url`` and connects. Raises StorageFailed."""
        upgrade_database(url)
        return cls.connect(url, clock)

    @classmethod
    def connect(cls, url: str, clock: Clock | None = None) -> Database:
        """Connects to a database whose tables are upgraded already."""
        return cls(create_database_engine(url), clock)

    def close(self) -> None:
        self.engine.dispose()


def open_database(
    url: str,
    say: Callable[[str], None],
    patience: float = PATIENCE_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Database:
    """The job database, waited for while it starts.

    Raises:
        StorageFailed: it did not answer in time.
    """
    give_up = time.monotonic() + patience
    while True:
        try:
            return Database.open(url)
        except StorageFailed as error:
            if time.monotonic() >= give_up:
                raise
            say(f"Waiting for the job database: {error.message}")
        sleep(PAUSE_SECONDS)
