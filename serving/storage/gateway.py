"""The pictures of a model app's jobs, through the gateways: it has no way to the bucket itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import httpx

from calotype.serving.core.errors import NotFound, StorageFailed
from calotype.serving.core.protocols import PART_BYTES, OpenBlob
from calotype.serving.core.tls import believed_certificates
from calotype.serving.storage.keys import check_key

TOKEN = "CALOTYPE_INTERNAL_TOKEN"
"""Environment variable with the model's token."""
PATH = "/internal/v1/blobs"
SECONDS = 60.0
CONNECT_SECONDS = 3.0


class GatewayBlobStore:
    """A `BlobStore` that reaches the pictures of one model's jobs.

    Args:
        url: of the gateways' internal port.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self._client = httpx.Client(
            base_url=url.rstrip("/") + PATH,
            headers={"authorization": f"Bearer {token or os.environ.get(TOKEN, '')}"},
            timeout=httpx.Timeout(SECONDS, connect=CONNECT_SECONDS),
            verify=believed_certificates(),
            trust_env=False,
        )

    def close(self) -> None:
        self._client.close()

    def put(self, key: str, data: bytes) -> None:
        self._ask("PUT", key, data)

    def put_parts(self, key: str, parts: Iterable[bytes]) -> None:
        self.put(key, b"".join(parts))

    def get(self, key: str) -> bytes:
        return self._ask("GET", key)

    def open(self, key: str) -> OpenBlob:
        """Whole in memory: a model app reads pictures, and no files of batches."""
        data = self.get(key)
        starts = range(0, len(data), PART_BYTES)
        return OpenBlob(len(data), (data[start : start + PART_BYTES] for start in starts))

    def delete(self, key: str) -> None:
        self._ask("DELETE", key)

    def entries(self, prefix: str = "") -> Iterator[tuple[str, float]]:
        """Nothing: cleaning up is for the gateways."""
        return iter(())

    def _ask(self, method: str, key: str, data: bytes | None = None) -> bytes:
        try:
            answer = self._client.request(method, f"/{check_key(key)}", content=data)
        except httpx.HTTPError as error:
            raise StorageFailed(
                f"No gateway answers for the pictures of this model: {error}.", retry_after=10
            ) from error
        if answer.is_success:
            return answer.content
        if answer.status_code == 404:
            raise NotFound(f"There is no stored file {key!r}.")
        raise StorageFailed(
            f"The gateway refuses {method} of {key!r}: status {answer.status_code}.",
            retry_after=10,
        )
