"""The gateways' internal port over a database with jobs of two models, and clients of it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from servers.job_rows import add_job_row
from tests.operator import manifests

from calotype.serving.api.state.catalog import Catalog
from calotype.serving.cluster.remote_job_store import RemoteJobStore
from calotype.serving.config import ImageModel
from calotype.serving.core.errors import NotFound, StorageFailed
from calotype.serving.database.database import Database
from calotype.serving.storage.gateway import GatewayBlobStore
from calotype.serving.testing.in_memory import ManualClock, MemoryBlobStore
from calotype.serving.wire.model_token import ModelIdentity, make_model_token

INTERNAL = "the-internal-token-of-the-release"
OURS, THEIRS = ModelIdentity("calotype", "shapes"), ModelIdentity("shop", "flux")


def token(of: ModelIdentity) -> str:
    return make_model_token(INTERNAL, of)


class House:
    """The gateways' internal port over a database with jobs of two models."""

    def __init__(self, file: pathlib.Path) -> None:
        self.database = Database.connect(f"sqlite:///{file}", ManualClock())
        self._opened: list[RemoteJobStore | GatewayBlobStore] = []
        self.blobs = MemoryBlobStore()
        models = [manifests.model("shapes"), manifests.model("flux", "shop")]
        self.catalog = Catalog([ImageModel.model_validate(found) for found in models])
        self.team = self.database.teams.ensure_team("shoes").id
        self.url = ""

    def job(self, model: str, **request: Any) -> str:
        webhook = {"url": "https://example.com", "secret": "whsec"}
        sizes = {"size": "128x128", "rendered_size": "128x128"}
        row = {"team_id": self.team, "model": model, "input": {}, "webhook": webhook}
        return add_job_row(self.database, {**sizes, **request}, **row).id

    def running(self, model: str, **request: Any) -> str:
        job_id = self.job(model, **request)
        self.database.jobs.start_job(job_id, "r1", 1e12)
        return job_id

    def store(self, of: ModelIdentity = OURS) -> RemoteJobStore:
        found = RemoteJobStore(self.url, token(of))
        self._opened.append(found)
        return found

    def pictures(self, of: ModelIdentity = OURS) -> GatewayBlobStore:
        found = GatewayBlobStore(self.url, token(of))
        self._opened.append(found)
        return found

    def close(self) -> None:
        for client in self._opened:
            client.close()
        self.database.close()


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except (NotFound, StorageFailed):
        return True
    return False
