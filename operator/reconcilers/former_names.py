"""Workloads that an earlier release made under the bare name of their model or training.

Today's have a prefix (`kube.labels.workload_name`), so that an upgrade leaves the earlier ones
running beside them. They are recognised by their owner, by uid.
"""

from __future__ import annotations

from calotype.operator.api.conditions import Reason
from calotype.operator.kube.client import ApiError
from calotype.operator.kube.labels import owned_by
from calotype.operator.kube.objects import Manifest, Object, address_of
from calotype.operator.kube.resources import (
    DEPLOYMENTS,
    POD_MONITORS,
    RAY_JOBS,
    RAY_SERVICES,
    SERVICES,
)
from calotype.operator.runtime.context import Context

_OF_MODELS = (SERVICES, POD_MONITORS, DEPLOYMENTS, RAY_SERVICES)
"""The Service first: it has the labels of today's pods in its selector."""


async def delete_former_workload(context: Context, obj: Object) -> None:
    """Deletes what an earlier release made of an ImageModel; looked for once.

    Called when its workload of today is ready: until then pictures are drawn by the earlier one.
    """
    namespace, name = address_of(obj)
    if (namespace, name) in context.renamed:
        return
    for resource in _OF_MODELS:
        found = await context.kube.get(resource, namespace, name)
        if found is None or not owned_by(found, obj):
            continue
        try:
            await context.kube.delete(resource, namespace, name, found["metadata"]["uid"])
        except ApiError as error:
            if error.status != 403:
                raise
            await context.events.post(
                obj,
                "Warning",
                Reason.OBJECT_NOT_OURS,
                f"The {resource.kind} {name} of an earlier release is not needed any more, and the "
                "operator may not delete it: delete it by hand.",
            )
    context.renamed.add((namespace, name))


async def former_training_job(context: Context, obj: Object) -> Manifest | None:
    """The RayJob that an earlier release began for a LoRATraining, which goes on to its end."""
    found = await context.kube.get(RAY_JOBS, *address_of(obj))
    return found if found is not None and owned_by(found, obj) else None
