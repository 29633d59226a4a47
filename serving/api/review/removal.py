"""What is left to do once the database says that pictures are gone: their bytes, and open jobs.

Nothing of it is needed to stop serving them, and all of it may be repeated: what fails here is done
by a later sweep.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from calotype.serving.api.state.gateway import Gateway
from calotype.serving.core.errors import CalotypeError
from calotype.serving.database.review.removals import Removal
from calotype.serving.jobs.endings import Ending, source_gone_ending

log = logging.getLogger(__name__)


def carry_out(gateway: Gateway, removal: Removal) -> int:
    """Deletes the files of a removal, and ends the jobs that are drawn from it; how many files."""
    end_jobs(gateway, sorted(removal.open_jobs))
    return len(delete_blobs(gateway, removal.blobs))


def delete_blobs(gateway: Gateway, keys: Iterable[str]) -> list[str]:
    """Deletes what is noted as garbage; those that are gone."""
    gone: list[str] = []
    for key in keys:
        try:
            gateway.blobs.delete(key)
        except CalotypeError as error:  # the others go all the same
            log.warning("%s is deleted later: %s", key, error)
        else:
            gone.append(key)
    try:
        gateway.database.files.forget_garbage(gone)
    except CalotypeError as error:  # deleting it again is no error
        log.warning("%d deleted files are noted later: %s", len(gone), error)
    return gone


def end_jobs(gateway: Gateway, job_ids: Iterable[str], ending: Ending | None = None) -> None:
    """Ends jobs that must not be drawn any more; generators hear it with a heartbeat.

    Args:
        ending: why; None = they are drawn from what was taken down.
    """
    for job_id in job_ids:
        try:
            gateway.database.jobs.finish_job(job_id, ending or source_gone_ending())
        except CalotypeError as error:
            log.warning("job %s is ended later: %s", job_id, error)
