"""Amounts as Kubernetes writes them: ``8Gi``, ``500M``, ``1073741824``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from calotype.serving.config.base import VALIDATIONS

_QUANTITY = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E|)")
_POWERS = {"k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6, "K": 1}
LONGEST = 32
MESSAGE = (
    "an amount is a number above 0 with a unit of Kubernetes, for example 8Gi (8 x 1024^3 bytes) "
    "or 500M (500 million bytes)"
)


def bytes_of(quantity: str) -> int:
    """How many bytes an amount is; a part of a byte counts as a whole one.

    Raises:
        ValueError: the text is no amount above 0; says what one looks like.
    """
    match = _QUANTITY.fullmatch(quantity)
    if match is None or len(quantity) > LONGEST:
        raise ValueError(f"{MESSAGE}; got {quantity[:100]!r}")
    unit = match["unit"]
    base = 1024 if unit.endswith("i") else 1000
    found = Decimal(match["number"]) * Decimal(base) ** (_POWERS[unit[0]] if unit else 0)
    if found <= 0:
        raise ValueError(f"{MESSAGE}; got {quantity!r}")
    return int(found.to_integral_value(rounding="ROUND_CEILING"))


@dataclass(frozen=True, slots=True)
class _IntOrString:
    """A whole number of bytes, or a text that `bytes_of` reads; kept as text."""

    def _check(self, given: Any) -> str:
        if isinstance(given, bool) or not isinstance(given, int | str):
            raise ValueError(f"{MESSAGE}; got {str(given)[:100]!r}")
        bytes_of(str(given))
        return str(given)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        pattern = r"^[0-9]+(\\.[0-9]+)?(Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E)?$"
        return {
            "x-kubernetes-int-or-string": True,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": LONGEST,
            VALIDATIONS: [
                {
                    "rule": f"type(self) == int ? self > 0 : (self.matches('{pattern}') && "
                    "quantity(self).isGreaterThan(quantity('0')))",
                    "message": MESSAGE,
                }
            ],
        }


Quantity = Annotated[str, _IntOrString()]
