"""The end of an ImageModel: it drains, and then Kubernetes deletes what it owns."""

from __future__ import annotations

from calotype.operator.api.conditions import Condition, Reason, false, recorded_facts, timestamp
from calotype.operator.kube.objects import Address, Manifest, address_of
from calotype.operator.kube.resources import IMAGE_MODELS
from calotype.operator.runtime.context import Context
from calotype.operator.runtime.workqueue import Key


def forget_model(context: Context, address: Address) -> None:
    """Forgets what was remembered of a model that is gone."""
    context.reports.pop(address, None)
    context.pushed.pop(address, None)
    context.renamed.discard(address)
    context.debounce.clear(Key("ImageModel", *address))
    for adapter in context.store.adapters_of(address):
        context.wake_adapter(adapter)
    context.wake_gateway(0.0)


async def finish_model(context: Context, obj: Manifest) -> float | None:
    """Lets running requests end, then lets Kubernetes delete what the model owns."""
    address = address_of(obj)
    elapsed = context.finalizers.deleting_for(obj) or 0.0
    await context.refresh_namespace(address[0])
    why = context.finalizers.overdue(obj, elapsed)
    report = context.reports.get(address)
    # The gateway forgets the model first; what is queued by then still runs.
    busy = report is not None and report.reachable and report.queue_seconds > 0
    if why is None and (elapsed < context.settings.drain_seconds or busy) and report is not None:
        if report.reachable and report.ready:
            waiting = f"It ends when {report.queue_seconds:.0f} s of work are done."
            facts = [
                *recorded_facts(obj, Condition.READY),
                false(Condition.READY, Reason.DELETING, waiting),
            ]
            status = {k: v for k, v in (obj.get("status") or {}).items() if k != "conditions"}
            await context.statuses.write(obj, facts, {**status, "phase": "Terminating"})
            context.queue.add(Key("Report", *address))
            return context.settings.busy_poll_seconds
    if why is not None:
        at = timestamp(context.kube.now())
        await context.events.post(obj, "Warning", Reason.DELETING, f"Not drained by {at}: {why}.")
    await context.finalizers.remove(IMAGE_MODELS, obj)
    return None
