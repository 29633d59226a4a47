"""Why a fetch failed: one word for programs, one sentence for people."""

from __future__ import annotations

import enum
import errno

from calotype.serving.core.errors import CalotypeError


class Fault(enum.StrEnum):
    """The ``reason`` of a failed fetch."""

    # of the order
    ORDER_INVALID = "OrderInvalid"
    SOURCE_INVALID = "SourceInvalid"
    LICENCE_NOT_ALLOWED = "LicenceNotAllowed"
    # of the place that the weights come from
    NOT_FOUND = "NotFound"
    CREDENTIALS_REJECTED = "CredentialsRejected"
    UNREACHABLE = "Unreachable"
    # of the volume
    VOLUME_FULL = "VolumeFull"
    VOLUME_FAILED = "VolumeFailed"
    # of the weights
    TOO_LARGE = "TooLarge"
    CHECKSUM_MISMATCH = "ChecksumMismatch"
    NOT_SAFETENSORS = "NotSafetensors"
    BAD_HEADER = "BadHeader"
    WRONG_DTYPE = "WrongDtype"
    UNKNOWN_KEYS = "UnknownKeys"
    WRONG_BASE_MODEL = "WrongBaseModel"
    RANK_TOO_HIGH = "RankTooHigh"
    BAD_WEIGHTS = "BadWeights"
    MODEL_INCOMPLETE = "ModelIncomplete"
    BASE_MODEL_MISSING = "BaseModelMissing"
    # ours
    FETCH_FAILED = "FetchFailed"


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
