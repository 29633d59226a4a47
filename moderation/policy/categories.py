"""The enumerations of the safety stage: categories, verdicts and modalities."""

from __future__ import annotations

import enum
import math


class Category(enum.StrEnum):
    """OpenAI's 13 names, as on the wire, then ours."""

    SEXUAL = "sexual"
    SEXUAL_MINORS = "sexual/minors"
    HARASSMENT = "harassment"
    HARASSMENT_THREATENING = "harassment/threatening"
    HATE = "hate"
    HATE_THREATENING = "hate/threatening"
    ILLICIT = "illicit"
    ILLICIT_VIOLENT = "illicit/violent"
    SELF_HARM = "self-harm"
    SELF_HARM_INTENT = "self-harm/intent"
    SELF_HARM_INSTRUCTIONS = "self-harm/instructions"
    VIOLENCE = "violence"
    VIOLENCE_GRAPHIC = "violence/graphic"
    IP_CHARACTER = "ip_character"
    PUBLIC_FIGURE = "public_figure"
    POLITICAL = "political"
    PROMPT_INJECTION = "prompt_injection"
    SHOCKING = "shocking"
    REAL_PERSON_INTIMATE = "real_person_intimate"


OPENAI_CATEGORIES: tuple[Category, ...] = tuple(Category)[:13]


class Verdict(enum.StrEnum):
    """What happens to a prompt or an image. REVIEW holds it for a person: it is not served."""

    ALLOW = "ALLOW"
    FLAG = "FLAG"
    BLUR = "BLUR"
    REVIEW = "REVIEW"
    BLOCK = "BLOCK"
    ERROR = "ERROR"

    @property
    def severity(self) -> int:
        return _SEVERITY[self]

    @property
    def served(self) -> bool:
        """Whether the caller gets what was checked."""
        return self in (Verdict.ALLOW, Verdict.FLAG)


_SEVERITY = {verdict: rank for rank, verdict in enumerate(Verdict)}


class Modality(enum.StrEnum):
    """What a score was measured on; each has its own thresholds."""

    TEXT = "text"
    IMAGE = "image"
    TILE = "tile"
    JUDGE = "judge"


def is_score(value: object) -> bool:
    """Whether a classifier's answer is a number from 0 to 1; NaN and infinity are not."""
    return isinstance(value, float | int) and math.isfinite(value) and -1e-6 <= value <= 1 + 1e-6
