"""PersistentVolumeClaims: is the volume there?"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping

from calotype.operator.api.conditions import Condition, Fact, Reason, false, moment
from calotype.operator.kube.objects import Object
from calotype.operator.settings import OperatorSettings


def waiting(claims: Iterable[Object | None]) -> bool:
    """Whether one of them has no volume yet."""
    return any(
        claim is None or (claim.get("status") or {}).get("phase") != "Bound" for claim in claims
    )


def volume_problem(
    claims: Mapping[str, Object | None],
    now: datetime.datetime,
    settings: OperatorSettings,
    type_: Condition = Condition.WEIGHTS_CACHED,
) -> Fact | None:
    """What is wrong with named claims; None = all can be mounted, or will soon.

    A claim may stay unbound until a pod wants it, so only one that has waited long is reported.
    """
    for name, claim in claims.items():
        if claim is None:
            return false(
                type_,
                Reason.VOLUME_MISSING,
                f"PersistentVolumeClaim {name} does not exist: create it, or correct the source.",
            )
        phase = (claim.get("status") or {}).get("phase")
        made = moment(claim["metadata"].get("creationTimestamp")) or now
        waited = (now - made).total_seconds()
        if phase == "Lost" or (phase != "Bound" and waited > settings.bind_seconds):
            spec = claim.get("spec") or {}
            kind = spec.get("storageClassName") or "the cluster's default"
            modes = ", ".join(spec.get("accessModes") or ())
            return false(
                type_,
                Reason.VOLUME_NOT_BOUND,
                f"PersistentVolumeClaim {name} has no volume after {waited:.0f} s: StorageClass "
                f"{kind} gives none with {modes}. `kubectl describe pvc {name}` says why.",
            )
    return None
