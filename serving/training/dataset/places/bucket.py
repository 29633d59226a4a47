"""A data set under a prefix of an S3 bucket, or of a store that speaks its protocol."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from calotype.serving.config.sources import S3Source
from calotype.serving.core.errors import InvalidRequest, NotFound, StorageFailed
from calotype.serving.training.dataset.sources import Entry, Limits, changed, too_large, within
from calotype.serving.weights.bucket import S3File, find_objects
from calotype.serving.weights.transfer import Interrupted
from calotype.serving.wire.fetch_faults import Fault, FetchFailed


class BucketSource:
    """Every object below ``s3://bucket/prefix/``, read by the version that was listed.

    Credentials and region come from the environment, as for weights (`weights.bucket`).

    Args:
        source: the prefix.

    Raises:
        NotFound: there is nothing below it.
        StorageFailed: the store does not answer, or refuses.
    """

    def __init__(self, source: S3Source, limits: Limits | None = None) -> None:
        self.name, self._source, self._limits = source.uri, source, limits or Limits()
        self._files: dict[str, S3File] = {}

    @classmethod
    def of(cls, uri: str, limits: Limits | None = None) -> Self:
        """By its address; AWS_ENDPOINT_URL names a store that is not Amazon's."""
        try:
            endpoint = os.environ.get("AWS_ENDPOINT_URL")
            return cls(S3Source(uri=uri, endpoint=endpoint or None, region=None), limits)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InvalidRequest(f"{uri[:120]}: {message}.", param="dataset") from None

    def entries(self) -> Sequence[Entry]:
        with _faults():
            files = [
                file
                for file in find_objects(self._source)
                if not any(part.startswith(".") for part in file.name.split("/"))
            ]
        # What was listed first stays the version that is read.
        self._files = {file.name: file for file in files} | self._files
        entries = [Entry(file.name, file.size, version=file.version) for file in files]
        return within(self._limits, entries, self.name)

    def read(self, name: str, most: int) -> bytes:
        file = self._files[name]
        if file.size > most:
            raise too_large(name, most)
        try:
            with _faults(), file.read(0, None) as (_, _, pieces):
                return b"".join(pieces)
        except NotFound:
            raise changed(name) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


@contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except FetchFailed as error:
        # An object that was replaced is a failed precondition, which has no fault of its own.
        gone = error.code in (Fault.NOT_FOUND, Fault.FETCH_FAILED)
        raise (NotFound if gone else StorageFailed)(str(error)) from None
    except Interrupted as error:
        raise StorageFailed(f"The store does not answer: {error}", retry_after=10) from None
