"""Jobs in a database, as a gateway would have written them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calotype.serving.database.database import Database
from calotype.serving.jobs.records import JobRecord, NewJob, new_id


def add_job_row(database: Database, drawn: Mapping[str, Any], **more: Any) -> JobRecord:
    """A queued job of the model shapes.

    Args:
        drawn: of its request, what is not as usual.
        more: of its row.
    """
    job_id = new_id("job")
    request = {
        **{"id": job_id, "prompt": "a dog", "size": "64x64", "rendered_size": "64x64"},
        **{"steps": 20, "guidance_scale": 3.0, "sampler": "flow-euler", "seed": 7, "n": 1},
        "loras": [],
        **drawn,
    }
    row: dict[str, Any] = {
        "team_id": database.teams.ensure_team("default").id,
        "model": "shapes",
        "input": {"request_id": "req_1", "output_format": "png"},
        "request": request,
        **more,
    }
    return database.jobs.create_job(NewJob(job_id, **row))
