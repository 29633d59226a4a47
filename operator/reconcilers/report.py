"""Polls model apps for their status, and wakes the reconcilers of what changed."""

from __future__ import annotations

from calotype.operator.kube.objects import Address
from calotype.operator.planning.model_report import ModelReport
from calotype.operator.reconcilers.workload import is_deployed, service_of
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.workqueue import Key
from calotype.serving.config import ImageModel
from calotype.serving.wire.model_token import ModelIdentity

MISSES = 3
"""Answers that may be missing in a row before the last one is forgotten."""


async def reconcile_report(context: Context, key: Key) -> float | None:
    """Polls one model app; returns when to poll again."""
    address = (key.namespace, key.name)
    model = context.store.model(address)
    obj = context.store.get("ImageModel", address)
    deployed = model is not None and obj is not None and is_deployed(obj)
    if model is None or not deployed or model.spec.suspend:
        if context.reports.pop(address, None) is not None:
            context.wake_model(address)
            _wake_adapters(context, address, None)
        return None
    url = context.apps.url(service_of(model), model.metadata.namespace)
    now = await context.apps.status(url, ModelIdentity(*address))
    before = context.reports.get(address)
    if not now.reachable:
        missed = context.missed[address] = context.missed.get(address, 0) + 1
        if before is not None and before.reachable and missed < MISSES:
            return context.settings.busy_poll_seconds
    else:
        context.missed.pop(address, None)
    context.reports[address] = now
    _wake_concerned(context, address, before, now)
    return _pause(context, address, now)


async def first_report(context: Context, address: Address, model: ImageModel) -> None:
    """Asks at once where nobody has asked yet: after a start, a status must not say less than it
    did before only because we know nothing."""
    if address not in context.reports:
        url = context.apps.url(service_of(model), model.metadata.namespace)
        context.reports[address] = await context.apps.status(url, ModelIdentity(*address))


def _wake_concerned(
    context: Context, address: Address, before: ModelReport | None, now: ModelReport
) -> None:
    if before is None or _summary(before) != _summary(now):
        context.wake_model(address)
        context.wake_gateway()
    if before is None or before.replica_set() != now.replica_set():
        _wake_adapters(context, address, None)
        return
    old, new = before.adapter_views(), now.adapter_views()
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    if changed:
        context.wake_model(address, context.settings.busy_poll_seconds)
        _wake_adapters(context, address, changed)


def _wake_adapters(context: Context, address: Address, names: set[str] | None) -> None:
    for adapter in context.store.adapters_of(address):
        if names is None or adapter[1] in names:
            context.wake_adapter(adapter)


def _summary(report: ModelReport) -> tuple[object, ...]:
    return (
        report.reachable,
        report.ready,
        report.replicas,
        report.config_hash,
        report.message,
        report.queue_seconds > 0,
    )


def _pause(context: Context, address: Address, now: ModelReport) -> float:
    """Often while something is under way."""
    obj = context.store.get("ImageModel", address)
    if obj is None:
        return context.settings.busy_poll_seconds
    pushed = context.pushed.get(address)
    status = obj["status"]
    settled = (
        now.reachable
        and now.ready
        and "deletionTimestamp" not in obj["metadata"]
        and (not now.config_hash or now.config_hash == status.get("configHash"))
        and all(
            adapter.state == "ready"
            for replica in now.states
            if replica.ready
            for adapter in replica.adapters.values()
        )
        and (pushed is None or all(_has_each(now, name) for name in pushed))
    )
    settings = context.settings
    return settings.status_poll_seconds if settled else settings.busy_poll_seconds


def _has_each(report: ModelReport, name: str) -> bool:
    """Whether every replica that draws says something of an adapter."""
    return all(name in replica.adapters for replica in report.states if replica.ready)
