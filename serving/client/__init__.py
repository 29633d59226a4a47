"""A typed client of the service, for Python code of product teams and for the command line.

    with Client("https://img.example", "ct_live_...") as client:
        job = client.submit({"prompt": "a red fox", "seed": 7})
        job = client.wait(job.id)
        picture = client.download(job.images[0])

`AsyncClient` has the same methods to be awaited. What the service refuses raises `ApiError` with
its code, its parameter and its request ID. `Reviewer` is a `Client` that also speaks with the
safety stage's people: appeals, reports, the queue of cases.
"""

from __future__ import annotations

from calotype.serving.client.asynchronous import AsyncClient
from calotype.serving.client.calls import ApiError, ServiceUnreachable
from calotype.serving.client.models import Image, Job, JobEvent, JobPage
from calotype.serving.client.moderation import Case, Reviewer, Takedown
from calotype.serving.client.synchronous import Client

__all__ = [
    "ApiError",
    "AsyncClient",
    "Case",
    "Client",
    "Image",
    "Job",
    "JobEvent",
    "JobPage",
    "Reviewer",
    "ServiceUnreachable",
    "Takedown",
]
