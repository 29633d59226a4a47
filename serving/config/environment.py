"""What a process of a cluster is told by its environment.

CALOTYPE_DATA_DIR        folder of caches, audit logs and the embedded database
CALOTYPE_DATABASE_URL    job database; SQLite in the data folder if missing
CALOTYPE_BLOB_URL        where pictures are kept; a folder of the data folder if missing
CALOTYPE_INTERNAL_TOKEN  what gateway and model apps know each other by; must be there
CALOTYPE_NODE_NAME       the machine, as load states name it; its host name if missing
CALOTYPE_TLS_*           certificate and key of its own, and whom it believes (`core.tls`)
"""

from __future__ import annotations

import os
import pathlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from calotype.serving.core.errors import InvalidRequest
from calotype.serving.core.tls import TlsFiles, shown_certificate
from calotype.serving.storage import open_blobs

DATA_DIR = "CALOTYPE_DATA_DIR"
DATABASE_URL = "CALOTYPE_DATABASE_URL"
BLOB_URL = "CALOTYPE_BLOB_URL"
INTERNAL_TOKEN = "CALOTYPE_INTERNAL_TOKEN"
NODE_NAME = "CALOTYPE_NODE_NAME"
MIN_TOKEN_CHARS = 8


@dataclass(frozen=True, slots=True)
class Storage:
    """Where a process finds what outlives it."""

    data_dir: pathlib.Path
    database_url: str
    blob_url: str

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> Storage:
        """Reads the first three variables of the table above.

        Raises:
            InvalidRequest: one says what cannot be used.
        """
        data_dir = pathlib.Path(variables.get(DATA_DIR) or "calotype-data").resolve()
        blob_url = variables.get(BLOB_URL) or (data_dir / "assets").as_uri()
        try:
            open_blobs(blob_url)
        except InvalidRequest as error:
            raise InvalidRequest(f"{BLOB_URL}: {error.message}") from None
        database = variables.get(DATABASE_URL) or f"sqlite:///{data_dir / 'calotype.db'}"
        return cls(data_dir, database, blob_url)


@dataclass(frozen=True, slots=True)
class ClusterEnvironment:
    """Where a process of a cluster finds what it shares with the others."""

    data_dir: pathlib.Path
    database_url: str
    blob_url: str
    internal_token: str = field(repr=False)
    node: str
    tls: TlsFiles | None = None
    """Of a model app, and of a gateway's internal port; None = they speak plain HTTP."""

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> ClusterEnvironment:
        """Reads the table above.

        Raises:
            InvalidRequest: a variable is missing or says what cannot be used.
        """
        token = variables.get(INTERNAL_TOKEN, "").strip()
        if len(token) < MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable():
            raise InvalidRequest(
                f"{INTERNAL_TOKEN} must be set to a secret of at least {MIN_TOKEN_CHARS} plain "
                "characters; gateway and model apps need the same one."
            )
        kept = Storage.read(variables)
        node = variables.get(NODE_NAME) or socket.gethostname()
        tls = shown_certificate(variables)
        return cls(kept.data_dir, kept.database_url, kept.blob_url, token, node, tls)
