"""Quantities of Kubernetes, as in 500m, 2Gi or 1e3."""

import math
import re

SUFFIXES = {
    **{"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0},
    **{"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15},
    **{f"{letter}i": 2.0 ** (10 * (power + 1)) for power, letter in enumerate("KMGTP")},
}


def parse(text: str | int | float) -> float:
    """The number that a quantity stands for; ValueError says which text is none."""
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([numkMGTP]?i?)", str(text))
    if not match or match[2] not in SUFFIXES:
        raise ValueError(f"{text!r} is no quantity; write for example 500m or 2Gi")
    return float(match[1]) * SUFFIXES[match[2]]


def divided(value: str | int | float, divisor: str | int | float) -> str:
    """What a resourceFieldRef gives: value / divisor, rounded up; a divisor of 0 counts as 1."""
    return str(math.ceil(parse(value) / (parse(divisor) or 1.0)))
