"""The errors of the safety stage. It stands alone, so they are no part of serving's tree.

* ModerationError
  - PolicyError             a policy document is wrong; names the file and the field
  - EvaluationError         an evaluation data set is wrong; names the file and the column
  - ImageError            what was given is not an image
  - ClassifierUnavailable   a classifier is missing, failed or answered nonsense
    + ClassifierTimedOut    it hung over what it was given
  - ProvenanceError         an image cannot be marked, or its marks cannot be read
"""

from __future__ import annotations


class ModerationError(Exception):
    """Root: one sentence that says what is wrong, where, and what to write instead."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class PolicyError(ModerationError):
    """A policy document cannot be used."""


class EvaluationError(ModerationError):
    """A data set cannot be evaluated."""


class ImageError(ModerationError):
    """The pixels cannot be checked: wrong type, shape or size."""


class ClassifierUnavailable(ModerationError):
    """A classifier gave no usable scores. The moderator turns it into verdict ERROR."""


class ClassifierTimedOut(ClassifierUnavailable):
    """It did not answer in time: perhaps it is what it was given that it hangs over."""


class AuditError(ModerationError):
    """An audit log is not what was written."""


class ProvenanceError(ModerationError):
    """An image cannot be marked, or its marks cannot be read."""
