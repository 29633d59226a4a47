"""Conditions of a status: their moment changes only with their value."""

from datetime import UTC, datetime

from controlplane.client.objects import Object


def put(
    status: Object, kind: str, holds: bool, reason: str, message: str = "", generation: int = 0
) -> None:
    """Sets a condition in `status["conditions"]`."""
    conditions: list[Object] = status.setdefault("conditions", [])
    old = next((one for one in conditions if one["type"] == kind), None)
    fresh: Object = {"type": kind, "status": str(holds), "reason": reason, "message": message}
    fresh["lastTransitionTime"] = now()
    if generation:
        fresh["observedGeneration"] = generation
    if old is None:
        conditions.append(fresh)
        return
    if old["status"] == fresh["status"]:
        fresh["lastTransitionTime"] = old["lastTransitionTime"]
    old.update(fresh)


def holds(status: Object, kind: str) -> bool:
    """Whether a condition is there and true."""
    found = status.get("conditions", [])
    return any(one["type"] == kind and one["status"] == "True" for one in found)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_since(moment: str) -> float:
    then = datetime.strptime(moment, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return (datetime.now(UTC) - then).total_seconds()
