"""Blobs in an object store: S3 and what speaks its protocol, or Google Cloud Storage."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from calotype.serving.core.errors import InvalidRequest, NotFound, StorageFailed
from calotype.serving.core.protocols import PART_BYTES, OpenBlob
from calotype.serving.storage.keys import check_key

_RETRIES = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
_TIMEOUT_SECONDS = "30s"
_UPLOAD_BYTES = 8 * 1024 * 1024
"""Of one part of an upload; S3 takes no smaller ones than 5 MiB, and 10,000 of them."""


class ObjectBlobStore:
    """A `BlobStore` behind ``s3://bucket/prefix`` or ``gs://bucket/prefix``.

    Credentials, region and endpoint come from the environment as the providers' own tools read it
    (``AWS_ACCESS_KEY_ID``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``
    and so on) or from ``options``. A STORAGE_EMULATOR_HOST stands for Google's server, as for
    Google's own libraries, and gets no credentials. An object store shows an object only when it is
    complete.

    Raises:
        InvalidRequest: the URL or an option cannot be used, or the library is not installed.
    """

    def __init__(self, url: str, options: Mapping[str, str] | None = None) -> None:
        try:
            import obstore.store
            from obstore.exceptions import BaseError
        except ImportError:
            raise InvalidRequest(
                f"Pictures in {url[:120]} need the library obstore; install 'calotype[cloud]'."
            ) from None
        config, client = dict(options or {}), dict[str, Any](timeout=_TIMEOUT_SECONDS)
        endpoint = config.get("endpoint", "")
        if url.startswith("gs://") and (emulator := os.environ.get("STORAGE_EMULATOR_HOST")):
            endpoint = emulator if "://" in emulator else f"http://{emulator}"
            config["service_account_key"] = _nobody(endpoint)
        if endpoint.startswith("http://"):
            client["allow_http"] = True
        self._faults = (BaseError, OSError)
        from_url: Any = obstore.store.from_url  # typed by provider, which is chosen by the URL
        try:
            self._store = from_url(url, config=config, client_options=client, retry_config=_RETRIES)
        except (BaseError, ValueError) as error:
            raise InvalidRequest(f"The blob URL {url[:120]!r} cannot be used: {error}.") from None
        self.url = url

    def put(self, key: str, data: bytes) -> None:
        import obstore

        try:
            obstore.put(self._store, check_key(key), data)
        except self._faults as error:
            raise self._failed("stored in", error) from error

    def put_parts(self, key: str, parts: Iterable[bytes]) -> None:
        """As a multipart upload, which the store shows when its last part is there."""
        import obstore

        try:
            obstore.put(
                self._store,
                check_key(key),
                iter(parts),
                use_multipart=True,
                chunk_size=_UPLOAD_BYTES,
                max_concurrency=2,
            )
        except self._faults as error:
            raise self._failed("stored in", error) from error

    def get(self, key: str) -> bytes:
        import obstore

        try:
            return bytes(obstore.get(self._store, check_key(key)).bytes())
        except (FileNotFoundError, IsADirectoryError):
            raise NotFound(f"There is no stored file {key!r}.") from None
        except self._faults as error:
            raise self._failed("read from", error) from error

    def open(self, key: str) -> OpenBlob:
        import obstore

        try:
            found = obstore.get(self._store, check_key(key))
        except (FileNotFoundError, IsADirectoryError):
            raise NotFound(f"There is no stored file {key!r}.") from None
        except self._faults as error:
            raise self._failed("read from", error) from error
        return OpenBlob(int(found.meta["size"]), self._parts(found))

    def _parts(self, found: Any) -> Generator[bytes]:
        try:
            rest = bytearray()
            for part in found.stream(min_chunk_size=PART_BYTES):
                rest += part
                while len(rest) >= PART_BYTES:
                    yield bytes(rest[:PART_BYTES])
                    del rest[:PART_BYTES]
            if rest:
                yield bytes(rest)
        except self._faults as error:
            raise self._failed("read from", error) from error

    def delete(self, key: str) -> None:
        import obstore

        try:
            obstore.delete(self._store, check_key(key))
        except FileNotFoundError:
            return
        except self._faults as error:
            raise self._failed("deleted from", error) from error

    def entries(self, prefix: str = "") -> Iterator[tuple[str, float]]:
        """(key, time of its last `put`) of every blob."""
        import obstore

        try:
            for page in obstore.list(self._store, prefix=prefix or None):
                for meta in page:
                    yield str(meta["path"]), meta["last_modified"].timestamp()
        except self._faults as error:
            raise self._failed("listed in", error) from error

    def _failed(self, verb: str, error: Exception) -> StorageFailed:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        return StorageFailed(
            f"The picture could not be {verb} {self.url}: {reason}.", retry_after=10
        )


def _nobody(endpoint: str) -> str:
    """What obstore reads as a service account that signs nothing and calls another server."""
    return json.dumps(
        {
            "gcs_base_url": endpoint,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
    )
