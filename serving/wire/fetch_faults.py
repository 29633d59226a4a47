"""Why a fetch failed: one word for programs, one sentence for people."""

from __future__ import annotations

import enum
import errno
from typing import Self

from calotype.serving.core.errors import CalotypeError


class Fault(enum.StrEnum):
    """The ``reason`` of a failed fetch.

    Attributes:
        final: trying the same again would change nothing: the manifest, the Secret or the weights
            have to change first.
        in_file: the weights were found and read, and what they hold is refused.
    """

    final: bool
    in_file: bool

    def __new__(cls, word: str, final: bool, in_file: bool = False) -> Self:
        member = str.__new__(cls, word)
        member._value_ = word
        member.final, member.in_file = final, in_file
        return member

    # of the order
    ORDER_INVALID = "OrderInvalid", True
    SOURCE_INVALID = "SourceInvalid", True
    LICENCE_NOT_ALLOWED = "LicenceNotAllowed", True
    # of the place that the weights come from
    NOT_FOUND = "NotFound", True
    CREDENTIALS_REJECTED = "CredentialsRejected", True
    UNREACHABLE = "Unreachable", False
    # of the volume
    VOLUME_FULL = "VolumeFull", False
    VOLUME_FAILED = "VolumeFailed", False
    # of the weights
    TOO_LARGE = "TooLarge", True, True
    CHECKSUM_MISMATCH = "ChecksumMismatch", True
    NOT_SAFETENSORS = "NotSafetensors", True, True
    BAD_HEADER = "BadHeader", True, True
    WRONG_DTYPE = "WrongDtype", True, True
    UNKNOWN_KEYS = "UnknownKeys", True, True
    WRONG_BASE_MODEL = "WrongBaseModel", True, True
    RANK_TOO_HIGH = "RankTooHigh", True, True
    BAD_WEIGHTS = "BadWeights", True, True
    MODEL_INCOMPLETE = "ModelIncomplete", True
    BASE_MODEL_MISSING = "BaseModelMissing", False
    # ours
    FETCH_FAILED = "FetchFailed", False


def fault_of(reason: str) -> Fault | None:
    """The fault of that name; None for a word that this version does not know."""
    return next((fault for fault in Fault if fault == reason), None)


class FetchFailed(CalotypeError):
    """A fetch that ended without weights; ``code`` is a `Fault`."""

    default_code = Fault.FETCH_FAILED.value


def failed(fault: Fault, message: str) -> FetchFailed:
    return FetchFailed(message, code=fault.value)


def volume_failed(error: OSError, what: str) -> FetchFailed:
    """``what`` names the file or folder that could not be written or read."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return failed(
            Fault.VOLUME_FULL,
            f"The cache volume is full: {what} does not fit. Enlarge the volume, or remove what "
            "is not needed any more.",
        )
    return failed(
        Fault.VOLUME_FAILED, f"{what} cannot be read or written ({error.strerror or error})."
    )
