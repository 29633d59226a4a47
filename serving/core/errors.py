"""The errors of calotype, grouped by what the catcher should do.

* CalotypeError
  - RequestError                 the caller must change something
    + InvalidRequest             a parameter is missing, unknown, of a wrong type or out of range
    + Unauthenticated            no API key, or a wrong one
    + PermissionDenied           the key is right but may not do this
    + NotFound                   no such model, adapter, job or asset (or not yours)
    + Conflict                   an idempotency key was used for another body
    + ContentBlocked             the safety stage refused the prompt or every image
    + DatasetRefused             pictures to learn from cannot be used; names file and field
    + QuotaExceeded              rate, quota or budget is spent
  - CapacityError                the caller may simply retry
    + Overloaded                 loading, draining or full
    + DeadlineExceeded           the time allowed for the job ran out
    + DependencyUnavailable      a part that the job needs is, or was for too long, away
  - EngineError                  ours
    + ModelLoadFailed            a model folder is incomplete, damaged or not FLUX.2
    + AdapterLoadFailed          a LoRA file is damaged, pickled or of another model
    + OutOfMemory                the device has not enough memory for this request
    + NonFiniteLatents           the denoiser produced NaN or infinity
    + GroupLost                  one of several devices that draw together is gone
    + StorageFailed              the disk is full or the database cannot be written
    + TrainingFailed             a training went wrong: its loss diverged, a checkpoint is damaged
    + ModerationUnavailable      a classifier is missing, failed or too slow: nothing passes
  - Cancelled                    the caller took the request back

Every class has the same constructor and hands all of its arguments to ``Exception``, so each one
survives pickling between Ray processes. HTTP status codes are not known here: they stand in one
table in ``api/app.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from calotype.serving.core.json_object import JsonObject


class CalotypeError(Exception):
    """Root of the tree.

    Args:
        message: one sentence: what is wrong, where, and what to write instead.
        code: machine-readable reason (``error.code`` on the wire); the class's default if None.
        param: the request field or file that is at fault.
        retry_after: seconds after which a retry may succeed.
        details: JSON-serialisable extras for the answer (for example ``moderation_details``).
    """

    default_code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message, code, param, retry_after, details)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after = retry_after
        self.details: JsonObject = dict(details or {})

    def __str__(self) -> str:
        return self.message

    def to_payload(self) -> JsonObject:
        """The JSON form in which a job row keeps its error."""
        return {
            "class": type(self).__name__,
            "message": self.message,
            "code": self.code,
            "param": self.param,
            "retry_after": self.retry_after,
            "details": self.details,
        }


class RequestError(CalotypeError):
    default_code = "invalid_value"


class InvalidRequest(RequestError):
    default_code = "invalid_value"


class Unauthenticated(RequestError):
    default_code = "invalid_api_key"


class PermissionDenied(RequestError):
    default_code = "insufficient_permissions"


class NotFound(RequestError):
    default_code = "not_found"


class Conflict(RequestError):
    default_code = "idempotency_key_mismatch"


class ContentBlocked(RequestError):
    default_code = "moderation_blocked"


class DatasetRefused(RequestError):
    default_code = "dataset_invalid"


class QuotaExceeded(RequestError):
    default_code = "rate_limit_exceeded"


class CapacityError(CalotypeError):
    default_code = "model_not_ready"
    retryable = True


class Overloaded(CapacityError):
    default_code = "model_not_ready"


class DeadlineExceeded(CapacityError):
    default_code = "generation_timeout"


class DependencyUnavailable(CapacityError):
    default_code = "dependency_unavailable"


class EngineError(CalotypeError):
    default_code = "internal_error"


class ModelLoadFailed(EngineError):
    default_code = "model_load_failed"


class AdapterLoadFailed(EngineError):
    default_code = "adapter_load_failed"


class OutOfMemory(EngineError):
    default_code = "resolution_too_large"


class NonFiniteLatents(EngineError):
    default_code = "non_finite_latents"


class GroupLost(EngineError):
    default_code = "internal_error"


class StorageFailed(EngineError):
    default_code = "storage_unavailable"
    retryable = True


class TrainingFailed(EngineError):
    default_code = "training_failed"


class ModerationUnavailable(EngineError):
    default_code = "moderation_unavailable"
    retryable = True


class Cancelled(CalotypeError):
    default_code = "canceled"


def all_error_classes() -> list[type[CalotypeError]]:
    """Every class of the tree, root first."""
    found: list[type[CalotypeError]] = [CalotypeError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return found


def error_from_payload(payload: JsonObject) -> CalotypeError:
    """Rebuilds the error that `CalotypeError.to_payload` wrote; unknown classes become the root."""
    classes = {cls.__name__: cls for cls in all_error_classes()}
    cls = classes.get(str(payload.get("class")), CalotypeError)
    return cls(
        str(payload.get("message") or "The request failed."),
        payload.get("code"),
        payload.get("param"),
        payload.get("retry_after"),
        payload.get("details"),
    )
