"""The operator's copy of the cluster's custom resources, kept up to date by watching.

Objects are kept without what nobody asks for, so that thousands fit. What depends on several of
them at once is computed here and remembered until something changes: which models are accepted
(`hosts`) and which adapters (`refusals`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

from calotype.operator.kube.labels import ACCEPTED, DELETE_DEADLINE, FORCE_DELETE
from calotype.operator.kube.objects import Address, Manifest, Object, address_of
from calotype.operator.manifests.custom_resources import InvalidSpec, adapter_manifest, parse
from calotype.operator.planning.adapter_policy import policy_problem
from calotype.operator.planning.adapters import (
    PATH_BYTES,
    Candidate,
    Host,
    admit,
    candidate_model,
)
from calotype.operator.planning.model_check import check_models
from calotype.operator.planning.model_names import rivals_of
from calotype.operator.planning.policies import NamedSpec, admit_policies, policy_of
from calotype.operator.planning.refusal import Refusal
from calotype.operator.planning.team_check import Declared
from calotype.operator.settings import OperatorSettings
from calotype.serving.config import ImageModel, LoRAAdapter

_KEPT_METADATA = (
    "name",
    "namespace",
    "uid",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "finalizers",
    "resourceVersion",
)
_KEPT_ANNOTATIONS = (FORCE_DELETE, DELETE_DEADLINE, ACCEPTED)
_DROPPED_STATUS = ("loadStates", "targetModules", "samples")


def trimmed(obj: Object) -> Manifest:
    """What is kept of an object."""
    metadata = obj["metadata"]
    kept = {key: metadata[key] for key in _KEPT_METADATA if key in metadata}
    annotations = metadata.get("annotations") or {}
    own = {key: annotations[key] for key in _KEPT_ANNOTATIONS if key in annotations}
    if own:
        kept["annotations"] = own
    status = obj.get("status") or {}
    return {
        "apiVersion": obj.get("apiVersion"),
        "kind": obj.get("kind"),
        "metadata": kept,
        "spec": obj.get("spec") or {},
        "status": {key: value for key, value in status.items() if key not in _DROPPED_STATUS},
    }


class Store:
    """Kind -> address -> object."""

    def __init__(self, settings: OperatorSettings) -> None:
        self._settings = settings
        self._objects: dict[str, dict[Address, Manifest]] = {}
        self._adapters: dict[Address, Candidate | InvalidSpec] = {}
        self._models: dict[Address, ImageModel | InvalidSpec] = {}
        self._hosts: dict[Address, Host] | None = None
        self._refusals: dict[Address, Refusal] | None = None
        self._declared: Declared | None = None
        self._policy_refusals: dict[Address, Refusal] | None = None
        self.namespace_labels: dict[str, dict[str, str]] = {}
        self.terminating: set[str] = set()

    def put(self, kind: str, obj: Object) -> None:
        """Remembers an object."""
        address, kept = address_of(obj), trimmed(obj)
        objects = self._objects.setdefault(kind, {})
        old = objects.get(address)
        objects[address] = kept
        if old is not None and _same_for_others(old, kept):
            return
        self._parse(kind, address, kept)
        self._forget()

    def drop(self, kind: str, address: Address) -> None:
        """Forgets an object."""
        self._objects.get(kind, {}).pop(address, None)
        self._adapters.pop(address, None) if kind == "LoRAAdapter" else None
        self._models.pop(address, None) if kind == "ImageModel" else None
        self._forget()

    def get(self, kind: str, address: Address) -> Manifest | None:
        return self._objects.get(kind, {}).get(address)

    def all(self, kind: str) -> Iterator[tuple[Address, Manifest]]:
        return iter(list(self._objects.get(kind, {}).items()))

    def count(self, kind: str) -> int:
        return len(self._objects.get(kind, {}))

    def set_namespace(self, name: str, labels: Mapping[str, str], terminating: bool) -> bool:
        """Remembers a namespace; says whether something about it is new."""
        before = self.namespace_labels.get(name)
        changed = before != dict(labels) or (name in self.terminating) != terminating
        self.namespace_labels[name] = dict(labels)
        (self.terminating.add if terminating else self.terminating.discard)(name)
        if changed:
            self._forget()
        return changed

    # --- models ---------------------------------------------------------------------------------

    def model(self, address: Address) -> ImageModel | None:
        found = self._models.get(address)
        return found if isinstance(found, ImageModel) else None

    def hosts(self) -> dict[Address, Host]:
        """Every model that is typed well, with why it is refused, if it is."""
        if self._hosts is None:
            models = {a: m for a, m in self._models.items() if isinstance(m, ImageModel)}
            ages = {a: self._created("ImageModel", a) for a in models}
            refusals = check_models(models, ages, self.policies(), self._settings)
            rivals = rivals_of(models, refusals)
            self._hosts = {a: Host(m, refusals.get(a), rivals.get(a)) for a, m in models.items()}
        return self._hosts

    def policies(self) -> dict[Address, Object]:
        """The specs of the ModerationPolicies that may be used."""
        refused = self.policy_refusals()
        policies = self.all("ModerationPolicy")
        return {address: obj["spec"] for address, obj in policies if address not in refused}

    def policy_refusals(self) -> dict[Address, Refusal]:
        """ModerationPolicies that must not be used, and why."""
        if self._policy_refusals is None:
            self._policy_refusals = admit_policies(
                dict(self.all("ModerationPolicy")), self._settings
            )
        return self._policy_refusals

    def policy_of(self, model: ImageModel) -> NamedSpec | None:
        """A model's ModerationPolicy; None = the package's."""
        return policy_of(model, self.policies())

    def declared(self) -> Declared:
        """What teams depend on."""
        if self._declared is None:
            models = {address: host.model for address, host in self.hosts().items()}
            teams = dict(self.all("Team"))
            self._declared = Declared(teams, self.policies(), models, self._settings)
        return self._declared

    # --- adapters -------------------------------------------------------------------------------

    def adapter(self, address: Address) -> LoRAAdapter | None:
        found = self._adapters.get(address)
        return found.adapter if isinstance(found, Candidate) else None

    def adapters_of(self, model: Address) -> list[Address]:
        """Addresses of the adapters that name a model, sorted."""
        return sorted(
            address
            for address, found in self._adapters.items()
            if isinstance(found, Candidate) and found.model == model
        )

    def refusals(self) -> dict[Address, Refusal]:
        """Adapters that must not be served, and why."""
        if self._refusals is None:
            hosts, policies = self.hosts(), self.policies()
            candidates = []
            for found in self._adapters.values():
                if isinstance(found, Candidate):
                    host = hosts.get(found.model)
                    model = host.model if host is not None else None
                    problem = policy_problem(found.adapter, model, policies)
                    candidates.append(replace(found, policy_problem=problem))
            self._refusals = admit(candidates, hosts, self.namespace_labels, self._settings)
        return self._refusals

    # --- within ---------------------------------------------------------------------------------

    def _created(self, kind: str, address: Address) -> str:
        found = self.get(kind, address)
        return str((found or {"metadata": {}})["metadata"].get("creationTimestamp") or "")

    def _parse(self, kind: str, address: Address, obj: Manifest) -> None:
        if kind == "ImageModel":
            try:
                self._models[address] = parse(ImageModel, obj)
            except InvalidSpec as error:
                self._models[address] = error
        elif kind == "LoRAAdapter":
            try:
                adapter = parse(LoRAAdapter, obj)
            except InvalidSpec as error:
                self._adapters[address] = error
                return
            rendered = json.dumps(adapter_manifest(adapter, None), separators=(",", ":"))
            self._adapters[address] = Candidate(
                address=address,
                created=self._created(kind, address),
                model=candidate_model(adapter),
                adapter=adapter,
                size=len(rendered) + PATH_BYTES,
            )

    def _forget(self) -> None:
        self._hosts = self._refusals = self._declared = self._policy_refusals = None


def _same_for_others(old: Object, new: Object) -> bool:
    """Whether only the status, or what belongs to the object alone, differs."""
    keys = ("uid", "generation", "deletionTimestamp")
    same = all(old["metadata"].get(key) == new["metadata"].get(key) for key in keys)
    accepted = [(obj["metadata"].get("annotations") or {}).get(ACCEPTED) for obj in (old, new)]
    return same and accepted[0] == accepted[1] and old["spec"] == new["spec"]
