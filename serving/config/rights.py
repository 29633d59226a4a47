"""By what right pictures may be learnt from: the record that goes with a data set."""

from __future__ import annotations

import datetime
from typing import Literal

from pydantic import Field

from calotype.serving.config.base import Rule, Spec


class Rights(Spec):
    """Licence, basis, holder, evidence and expiry; of a set, or of one picture of it."""

    rules = (
        Rule(
            lambda s: s.basis != "licensed" or s.licence is not None,
            "self.basis != 'licensed' || has(self.licence)",
            "basis 'licensed' needs the licence: name it in licence, for example 'CC-BY-4.0'",
            ".licence",
        ),
        Rule(
            lambda s: s.basis != "consent" or s.evidence is not None,
            "self.basis != 'consent' || has(self.evidence)",
            "basis 'consent' needs evidence: say in evidence where the consent is kept",
            ".evidence",
        ),
    )

    basis: Literal["own", "licensed", "consent"] = Field(
        description="own: made by or for the holder; licensed: under a licence; consent: the "
        "people shown have agreed."
    )
    holder: str = Field(
        min_length=1, max_length=200, description="Who holds the rights, or gave the consent."
    )
    licence: str | None = Field(
        None, min_length=1, max_length=200, description="Licence, for example CC-BY-4.0."
    )
    evidence: str | None = Field(
        None, min_length=1, max_length=2000, description="Where the proof is kept: a URL or a file."
    )
    expires: datetime.date | None = Field(
        None, description="Last day on which it may be learnt from, YYYY-MM-DD. Default: no end."
    )

    def expired(self, day: datetime.date) -> bool:
        """Whether the last day is before ``day``."""
        return self.expires is not None and self.expires < day
