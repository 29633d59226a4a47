"""What the process that holds Ray hears from the one that supervises it, and what it says.

Both are lines of JSON: orders on its standard input, reports on a pipe of their own. Both ends are
of one release, so the lines carry no version. Pictures, jobs and questions do not travel here but
over the HTTP of a model app (`cluster.model_ingress`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from calotype.serving.core.json_object import JsonObject

ALIVE_SECONDS = 2.0
_LINE = ConfigDict(extra="forbid", frozen=True)


class HostOrder(BaseModel):
    """Run exactly these applications. The first order also brings the token."""

    model_config = _LINE

    number: int = Field(description="Counts up; the report ``applied`` repeats it.")
    applications: list[JsonObject] = Field(description="Applications of a Serve config.")
    token: str = Field("", repr=False, description="What callers of its HTTP side must show.")


class HostReport(BaseModel):
    """What has happened."""

    model_config = _LINE

    kind: Literal["stage", "started", "alive", "serving", "applied", "refused", "said", "failed"]
    """``stage``: what it does now. ``started``: Ray runs. ``alive``: every `ALIVE_SECONDS` from
    then on. ``serving``: it answers on its socket. ``applied``: the order of that number runs.
    ``refused``: it cannot run. ``said``: a sentence for whoever reads the log. ``failed``: why it
    ends."""
    text: str = ""
    number: int = 0
    final: bool = Field(False, description="A failure that another try would only repeat.")
