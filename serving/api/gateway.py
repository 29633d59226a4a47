"""What every route needs, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from starlette.requests import Request

from calotype.serving.api.attendance import Attendance
from calotype.serving.api.catalog import Catalog
from calotype.serving.api.settings import GatewaySettings
from calotype.serving.jobs.store import JobStore
from calotype.serving.protocols import BlobStore, GenerationBackend


@dataclass(frozen=True, slots=True)
class Gateway:
    settings: GatewaySettings
    store: JobStore
    blobs: BlobStore
    backend: GenerationBackend
    catalog: Catalog
    attendance: Attendance
    url_secret: bytes
    """Signs asset URLs; the same on every gateway of one service."""

    def base_url(self, request: Request) -> str:
        return (self.settings.public_url or str(request.base_url)).rstrip("/")


def gateway_of(request: Request) -> Gateway:
    return cast(Gateway, request.app.state.gateway)


def request_id_of(request: Request) -> str:
    return cast(str, request.state.request_id)
