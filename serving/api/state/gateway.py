"""What every route needs, in one place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request

from calotype.serving.api.state.catalog import Catalog
from calotype.serving.api.state.change_poller import ChangePoller
from calotype.serving.api.state.disconnects import ClientWaits
from calotype.serving.api.state.eta import Estimates
from calotype.serving.api.state.request_rates import RequestRates
from calotype.serving.api.state.settings import GatewaySettings
from calotype.serving.api.state.working_memory import WorkingMemory
from calotype.serving.core.protocols import BlobStore, GenerationBackend
from calotype.serving.database.database import Database
from calotype.serving.observability.loops import Loops
from calotype.serving.webhooks.safe_http import OutboundPolicy

Refresh = Callable[[], Awaitable[bool]]


async def nothing_new() -> bool:
    """The `Gateway.refresh` of a service whose declarations do not change."""
    return False


@dataclass(frozen=True, slots=True)
class Gateway:
    settings: GatewaySettings
    database: Database
    blobs: BlobStore
    backend: GenerationBackend
    catalog: Catalog
    waits: ClientWaits
    url_secret: bytes
    """Signs asset URLs; the same on every gateway of one service."""
    estimates: Estimates
    change_poller: ChangePoller
    outbound: OutboundPolicy
    """Where webhooks and image URLs may lead."""
    rates: RequestRates
    """How fast each team may ask."""
    memory: WorkingMemory
    """Room for what is large."""
    noted_origins: set[str] = field(default_factory=set)
    """Digests of adapters of which the database knows what they learnt from."""
    loops: Loops = field(default_factory=Loops)
    """What it does between requests."""
    refresh: Refresh = nothing_new
    """Looks for what was declared a moment ago; says whether anything is new."""
    outlives_models: bool = False
    """It is ready without any model: other gateways and probes shall count on it all the same."""

    def base_url(self, request: Request | None) -> str:
        """How clients reach this gateway; without a request only if ``public_url`` says it."""
        seen = "" if request is None else str(request.base_url)
        return (self.settings.public_url or seen).rstrip("/")


def gateway_of(request: Request) -> Gateway:
    return cast(Gateway, request.app.state.gateway)


def request_id_of(request: Request) -> str:
    return cast(str, request.state.request_id)
