"""Where a model app keeps its jobs: the job database, or the gateways' job store."""

from __future__ import annotations

import logging
from typing import cast

from calotype.serving.cluster.remote_job_store import RemoteJobStore
from calotype.serving.config.environment import ClusterEnvironment
from calotype.serving.database.database import Database, open_database

log = logging.getLogger(__name__)


def open_job_store(url: str, *, upgrade: bool = True) -> Database:
    """The job database behind ``url``, waited for while it starts. Raises StorageFailed.

    In a pod of a model the URL is that of the gateways' internal port; what stands there has the
    part of a `Database` that a dispatcher and a moderator use.

    Args:
        upgrade: whether its tables are brought up to date.
    """
    if url.startswith(("http://", "https://")):
        token = ClusterEnvironment.read().internal_token
        return cast(Database, RemoteJobStore(url, token))
    return open_database(url, log.warning) if upgrade else Database.connect(url)
