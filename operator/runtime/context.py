"""What all reconcilers share: the connections to the cluster, and what is remembered in between."""

from __future__ import annotations

from dataclasses import dataclass, field

from calotype.operator.kube.client import KubeClient
from calotype.operator.kube.objects import Address
from calotype.operator.planning.model_report import ModelReport
from calotype.operator.runtime.credentials import CredentialReader
from calotype.operator.runtime.fetch_runner import FetchRunner, FetchSlots
from calotype.operator.runtime.metrics import Metrics
from calotype.operator.runtime.model_app import ModelApps
from calotype.operator.runtime.namespaces import refresh_namespace
from calotype.operator.runtime.store import Store
from calotype.operator.runtime.team_owners import TeamOwnersReader
from calotype.operator.runtime.workqueue import Debounce, Key, WorkQueue
from calotype.operator.runtime.writers.children import ChildWriter
from calotype.operator.runtime.writers.events import EventWriter
from calotype.operator.runtime.writers.finalizers import Finalizers
from calotype.operator.runtime.writers.statuses import StatusWriter
from calotype.operator.settings import OperatorSettings


@dataclass
class Context:
    """One operator's."""

    kube: KubeClient
    settings: OperatorSettings
    store: Store
    queue: WorkQueue
    metrics: Metrics
    apps: ModelApps
    credentials: CredentialReader
    fetches: FetchRunner
    slots: FetchSlots
    debounce: Debounce
    children: ChildWriter
    statuses: StatusWriter
    events: EventWriter
    finalizers: Finalizers
    team_owners: TeamOwnersReader
    reports: dict[Address, ModelReport] = field(default_factory=dict)
    """The last answer of each model app."""
    missed: dict[Address, int] = field(default_factory=dict)
    """How often in a row a model app did not answer."""
    pushed: dict[Address, frozenset[str]] = field(default_factory=dict)
    """The adapters in each model's configuration as it was written last."""
    fetch_jobs: dict[Key, set[str]] = field(default_factory=dict)
    """Names of the fetch Jobs that there are of an adapter or a model."""
    recheck: set[Key] = field(default_factory=set)
    renamed: set[Address] = field(default_factory=set)
    """Models beside which nothing of an earlier release runs under another name."""
    """What is applied again although nothing of ours changed: somebody may have edited it."""
    monitors_installed: bool | None = None
    """Whether PodMonitors exist; None = nobody has looked."""

    async def refresh_namespace(self, name: str) -> None:
        """Reads labels and phase of a namespace into the store."""
        await refresh_namespace(self.kube, self.store, name)

    def wake_model(self, address: Address, delay: float = 0.0) -> None:
        self.queue.add(Key("ImageModel", *address), delay)

    def wake_adapter(self, address: Address, delay: float = 0.0) -> None:
        self.queue.add(Key("LoRAAdapter", *address), delay)

    def wake_gateway(self, delay: float = 0.3) -> None:
        """A moment later, so that what belongs together is written together."""
        for kind in ("GatewayTeams", "Gateway"):
            self.queue.add(Key(kind, "", ""), delay)

    def adapters_changed(self, model: Address) -> None:
        """Has a model's configuration written when the burst of changes is over."""
        key = Key("ImageModel", *model)
        self.queue.add(key, self.debounce.touch(key))
        self.wake_gateway(self.settings.debounce_seconds)
