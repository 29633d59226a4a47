"""TLS of the processes of a service: the certificate that one shows, and those that it believes.

CALOTYPE_TLS_CERTIFICATE  certificate of model app or internal port, in PEM form; none = plain HTTP
CALOTYPE_TLS_KEY          its key
CALOTYPE_TLS_CA           whose certificates are believed of gateways and model apps
"""

from __future__ import annotations

import os
import pathlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from calotype.serving.core.errors import InvalidRequest

CERTIFICATE = "CALOTYPE_TLS_CERTIFICATE"
KEY = "CALOTYPE_TLS_KEY"
CA = "CALOTYPE_TLS_CA"


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
        self.context()
        return self

    def context(self) -> ssl.SSLContext:
        """What a server takes connections with. Raises InvalidRequest as `check` does."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidRequest(
                f"{self.certificate} and {self.key} cannot be used as certificate and key: {error}."
            ) from None
        return context


def tls_files(
    certificate: str | os.PathLike[str] | None,
    key: str | os.PathLike[str] | None,
    names: tuple[str, str] = ("--tls-certificate", "--tls-key"),
) -> TlsFiles | None:
    """What two options of a command, or two variables, name; None where they name nothing.

    Args:
        names: of the options.

    Raises:
        InvalidRequest: one of them is missing, or they cannot be used.
    """
    if not certificate and not key:
        return None
    if not certificate or not key:
        raise InvalidRequest(f"Give both {names[0]} and {names[1]}, or neither.")
    return TlsFiles(pathlib.Path(certificate), pathlib.Path(key)).check()


def shown_certificate(variables: Mapping[str, str] = os.environ) -> TlsFiles | None:
    """What the first two variables of the table above name. Raises InvalidRequest."""
    return tls_files(variables.get(CERTIFICATE), variables.get(KEY), (CERTIFICATE, KEY))


def believed_certificates(variables: Mapping[str, str] = os.environ) -> ssl.SSLContext | bool:
    """For ``verify`` of an HTTP client: the authority of the table above alone; without one the
    usual authorities.

    Raises:
        InvalidRequest: the file holds no certificate.
    """
    path = variables.get(CA)
    if not path:
        return True
    try:
        return ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise InvalidRequest(f"{CA}: {path} cannot be used: {error}.") from None
