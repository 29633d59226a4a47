"""The gateway speaks HTTPS with the certificate that it is given."""

from __future__ import annotations

import asyncio
import datetime
import pathlib
import socket
import ssl
import threading

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi import FastAPI

from calotype.serving.api.http.server import TlsFiles, build_server, tls_files
from calotype.serving.core.errors import InvalidRequest


@pytest.fixture
def files(tmp_path: pathlib.Path) -> TlsFiles:
    """A certificate for localhost that nobody signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )
    found = TlsFiles(tmp_path / "tls.crt", tmp_path / "tls.key")
    found.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    found.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return found


def test_the_server_speaks_https_with_its_certificate(files: TlsFiles) -> None:
    app = FastAPI()
    app.add_api_route("/healthz", lambda: {"status": "ok"})
    server = build_server(app, 1, files)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        # Signals are for the main thread, and nobody sends one here.
        serving = threading.Thread(
            target=lambda: asyncio.run(server._serve([listener])), daemon=True
        )
        serving.start()
        trust = ssl.create_default_context(cafile=str(files.certificate))
        with httpx.Client(verify=trust, trust_env=False, timeout=20) as client:
            answer = client.get(f"https://localhost:{port}/healthz")
        assert answer.json() == {"status": "ok"}
        server.should_exit = True
        serving.join(20)


def test_a_certificate_that_cannot_be_used_is_told_at_the_start(
    files: TlsFiles, tmp_path: pathlib.Path
) -> None:
    assert tls_files(None, None) is None
    with pytest.raises(InvalidRequest, match="both"):
        tls_files(files.certificate, None)
    with pytest.raises(InvalidRequest, match="cannot be used as certificate and key"):
        tls_files(files.certificate, tmp_path / "missing.key")
