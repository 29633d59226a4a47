"""Where fetched weights are kept."""

from __future__ import annotations

from pydantic import Field

from calotype.serving.config.base import Spec, Transition, unchanged
from calotype.serving.config.quantity import Quantity


class ClaimTemplate(Spec):
    """A PersistentVolumeClaim that the operator makes."""

    transitions = (
        Transition(
            unchanged("storageClassName"),
            "the storage class of a volume cannot be changed: remove cache, wait until the volume "
            "is gone, and add it again",
            ".storageClassName",
        ),
        Transition(
            "quantity(string(self.size)).compareTo(quantity(string(oldSelf.size))) >= 0",
            "a volume can grow but not shrink: give size at least its present value",
            ".size",
        ),
    )

    storage_class_name: str | None = Field(
        None,
        min_length=1,
        max_length=253,
        description="StorageClass; more than one node needs one with ReadWriteMany. Default: the "
        "cluster's. It cannot be changed later.",
    )
    size: Quantity = Field("100Gi", description="Size of the volume, in bytes; it may only grow.")


class Cache(Spec):
    """Where fetched weights are kept, so that a new replica does not fetch them again."""

    persistent_volume_claim: ClaimTemplate = Field(description="A volume of the model's own.")
