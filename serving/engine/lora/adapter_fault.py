"""Why a file cannot be used as an adapter: one word for programs, one sentence for people."""

from __future__ import annotations

import enum
import pathlib

from calotype.serving.core.errors import AdapterLoadFailed


class AdapterFault(enum.StrEnum):
    """``details["fault"]`` of an `AdapterLoadFailed` that a file's contents are the cause of."""

    UNKNOWN_KEY = "unknown_key"
    KEY_MISSING = "key_missing"
    UNSUPPORTED_KIND = "unsupported_kind"
    WRONG_BASE = "wrong_base"
    WRONG_DTYPE = "wrong_dtype"
    RANK_TOO_HIGH = "rank_too_high"
    BAD_WEIGHTS = "bad_weights"


def refused(
    path: pathlib.Path, fault: AdapterFault, sentence: str, key: str | None = None
) -> AdapterLoadFailed:
    """The error about a file.

    Args:
        sentence: completes "... cannot be used as an adapter: "; says what to do.
        key: of the file, that is at fault.
    """
    return AdapterLoadFailed(
        f"{path} cannot be used as an adapter: {sentence}.",
        param=str(path),
        details={"fault": fault.value, "key": key},
    )
