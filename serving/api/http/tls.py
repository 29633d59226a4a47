"""The certificate of a server that speaks HTTPS itself."""

from __future__ import annotations

import pathlib
import ssl
from dataclasses import dataclass

from calotype.serving.core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Files in PEM form. They are read once: another certificate takes another start."""

    certificate: pathlib.Path
    """With the certificates between it and its authority, where there are any."""
    key: pathlib.Path

    def check(self) -> TlsFiles:
        """
        Raises:
            InvalidRequest: one cannot be read, or they do not belong together.
        """
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidRequest(
                f"{self.certificate} and {self.key} cannot be used as certificate and key: {error}."
            ) from None
        return self


def tls_files(certificate: pathlib.Path | None, key: pathlib.Path | None) -> TlsFiles | None:
    """What the options of a command name; None where they name nothing.

    Raises:
        InvalidRequest: one of them is missing, or they cannot be used.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InvalidRequest("Give both --tls-certificate and --tls-key, or neither.")
    return TlsFiles(certificate, key).check()
