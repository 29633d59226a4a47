"""Objects in S3, or in a store that speaks its protocol.

Requests are signed with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_SESSION_TOKEN; without
them the bucket must be public.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from calotype.serving.config import S3Source
from calotype.serving.weights.transfer import Interrupted
from calotype.serving.wire.fetch_faults import Fault, FetchFailed, failed

PIECE_BYTES = 16 * 1024 * 1024
PIECE_SECONDS = "300s"
"""For one piece, not for the whole object."""
DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True, slots=True)
class S3File:
    """A `transfer.RemoteFile` in a bucket."""

    store: Any = field(repr=False)
    key: str
    """Path of the object below the bucket."""
    name: str
    size: int
    version: str
    """The object's ETag; a read of anything else is refused by the store."""
    sha256: str | None = None

    @contextlib.contextmanager
    def read(
        self, offset: int, version: str | None
    ) -> Iterator[tuple[int, str | None, Iterable[bytes]]]:
        yield offset, self.version, self._pieces(offset)

    def _pieces(self, offset: int) -> Iterator[bytes]:
        import obstore

        while offset < self.size:
            end = min(self.size, offset + PIECE_BYTES)
            with _faults(self.key):
                got = obstore.get(
                    self.store,
                    self.key,
                    options={"range": (offset, end), "if_match": self.version},
                )
                piece = bytes(got.bytes())
            yield piece
            offset += len(piece)


def find_objects(source: S3Source) -> list[S3File]:
    """The object of the URI, or everything under it when it ends with ``/`` or is no object.

    Raises:
        FetchFailed: nothing is there, it is not for these credentials, or nobody answers.
    """
    try:
        return _find(source)
    except Interrupted as error:
        raise failed(
            Fault.UNREACHABLE, f"The store of {source.uri} does not answer: {error}"
        ) from error


def _find(source: S3Source) -> list[S3File]:
    import obstore

    parts = urlsplit(source.uri)
    store, path = _open(source, parts.netloc), parts.path.lstrip("/")
    if path and not path.endswith("/"):
        with contextlib.suppress(FileNotFoundError), _faults(source.uri, missing_is_fault=False):
            return [_file(store, obstore.head(store, path), path.rpartition("/")[2])]
    prefix = path.rstrip("/")
    found: list[S3File] = []
    with _faults(source.uri):
        for page in obstore.list(store, prefix or None):
            for meta in page:
                name = str(meta["path"]).removeprefix(prefix).lstrip("/")
                if name and ".." not in name.split("/"):
                    found.append(_file(store, meta, name))
    if not found:
        raise failed(Fault.NOT_FOUND, f"There is nothing at {source.uri}.")
    return sorted(found, key=lambda file: file.name)


def _open(source: S3Source, bucket: str) -> Any:
    try:
        from obstore.store import S3Store
    except ImportError:
        raise failed(
            Fault.FETCH_FAILED, "s3 sources need the library obstore; install 'calotype[cloud]'."
        ) from None
    config: dict[str, object] = {"region": source.region or os.environ.get("AWS_REGION")}
    config["region"] = config["region"] or DEFAULT_REGION
    client: dict[str, object] = {"timeout": PIECE_SECONDS}
    if source.endpoint is not None:
        config |= {"endpoint": source.endpoint, "virtual_hosted_style_request": False}
        if source.endpoint.startswith("http://"):
            client["allow_http"] = True
    if not os.environ.get("AWS_ACCESS_KEY_ID"):
        config["skip_signature"] = True
    retries: dict[str, object] = {"max_retries": 2}  # `transfer` has patience of its own
    return S3Store(
        bucket,
        config=config,  # type: ignore[arg-type]
        client_options=client,  # type: ignore[arg-type]
        retry_config=retries,  # type: ignore[arg-type]
    )


def _file(store: Any, meta: Any, name: str) -> S3File:
    etag = meta.get("e_tag") or ""
    return S3File(store, str(meta["path"]), name, int(meta["size"]), str(etag))


def revision_of(files: Sequence[S3File]) -> str:
    """What the store itself calls the version of these objects, in one word."""
    text = "\n".join(f"{file.name} {file.size} {file.version}" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@contextlib.contextmanager
def _faults(what: str, missing_is_fault: bool = True) -> Iterator[None]:
    from obstore import exceptions

    try:
        yield
    except FetchFailed:
        raise
    except FileNotFoundError:
        if not missing_is_fault:
            raise
        raise failed(Fault.NOT_FOUND, f"There is no {what}, or no such bucket.") from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
        raise failed(
            Fault.CREDENTIALS_REJECTED,
            f"The store refuses {what}: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are missing, "
            "wrong or not allowed to read it.",
        ) from None
    except exceptions.PreconditionError:
        raise failed(
            Fault.FETCH_FAILED, f"{what} was replaced while it was fetched; fetch it again."
        ) from None
    except exceptions.BaseError as error:
        text = str(error)
        if "NoSuchBucket" in text:
            raise failed(Fault.NOT_FOUND, f"There is no bucket of {what}.") from None
        if "403" in text or "InvalidAccessKeyId" in text or "SignatureDoesNotMatch" in text:
            raise failed(
                Fault.CREDENTIALS_REJECTED,
                f"The store refuses {what}: AWS_ACCESS_KEY_ID or AWS_SECRET_ACCESS_KEY is wrong.",
            ) from None
        raise Interrupted(text.splitlines()[0][:300]) from error
