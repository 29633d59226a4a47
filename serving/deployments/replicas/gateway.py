"""The gateway as the ingress of a Ray Serve application (``serve run``).

`calotype serve` runs the same application in its own process instead, and a cluster in a
Kubernetes Deployment: there the gateway outlives the GPUs.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

from calotype.serving.api.app import create_app
from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.core.json_object import JsonObject
from calotype.serving.database.connection import sqlite_url
from calotype.serving.database.database import Database
from calotype.serving.deployments.backend import RayBackend
from calotype.serving.storage import FolderBlobStore
from calotype.serving.wire.application import GeneratorConfig

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


class GatewayDeployment:
    """Args:
    generator: bound so that Serve deploys the model app beside the gateway; called by nobody.
    api_key: recorded as a valid key when there is one.
    """

    def __init__(
        self, data_dir: str, app: str, api_key: str | None, generator: DeploymentHandle
    ) -> None:
        folder = pathlib.Path(data_dir)
        self._database = Database.open(sqlite_url(folder))
        first = self._database.api_keys.ensure_first(api_key)
        if first is not None:
            # Into the log of the replica: with `serve run` there is no terminal of ours.
            print(f"calotype: your API key, shown this once: {first}", flush=True)
        self._blobs = FolderBlobStore(folder / "assets")
        self._app, self._catalog = app, Catalog([])
        self._backend = RayBackend(self._database, {})

    def reconfigure(self, config: JsonObject) -> None:
        """Takes the `GeneratorConfig` of the model app beside it."""
        told = GeneratorConfig.model_validate(config)
        self._catalog.replace([told.model], told.adapters)
        self._backend.models = {told.model.name: self._app}

    def __serve_build_asgi_app__(self) -> Any:
        settings = GatewaySettings(set_request_id=False)
        return create_app(settings, self._database, self._blobs, self._backend, self._catalog)
