"""What becomes of pictures that wait for a person."""

from __future__ import annotations

from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import NotFound
from calotype.serving.database.review.cases import VERDICTS, CaseRecord
from calotype.serving.images.sealing import unseal
from calotype.serving.jobs.records import HeldRecord
from calotype.serving.storage import content_key


def open_held(gateway: Gateway, held: HeldRecord) -> bytes:
    """The file of a held picture. Raises StorageFailed: it is gone or was changed."""
    return unseal(gateway.blobs.get(held.blob_key), held.seal, held.asset_id)


def decide_held(
    gateway: Gateway, case: CaseRecord, reviewer: str, verdict: str, note: str
) -> CaseRecord:
    """Ends a case about a held picture: it goes to its team, or is gone.

    Raises:
        Conflict: see `jobs.cases.Cases.decide_case`.
        NotFound: the picture is not held any more.
    """
    database = gateway.database
    if verdict not in VERDICTS["review"] or case.status != "open" or case.held_by != reviewer:
        return database.cases.decide_case(case.id, reviewer, verdict, note)  # says what is wrong
    if verdict == "rejected":
        return database.held_images.reject_held(case, reviewer, note)
    held = database.held_images.get_held(case.subject)
    if held is None:
        raise NotFound(f"The picture '{case.subject}' is not held any more.")
    data = open_held(gateway, held)
    key = content_key(held.team_id, data, held.content_type.rpartition("/")[2])
    # Not a picture of anybody until the row names it; what no row names is swept.
    gateway.blobs.put(key, data)
    return database.held_images.release_held(case, reviewer, note, key)
