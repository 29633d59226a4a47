"""Certificates of an authority that nobody knows, made for one test."""

from __future__ import annotations

import datetime
import pathlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from calotype.serving.core.tls import TlsFiles


def make_certificates(folder: pathlib.Path) -> TlsFiles:
    """A certificate for localhost, and for the Services of the namespace art."""
    authority = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    names = [x509.DNSName("localhost"), x509.DNSName("*.art.svc")]
    signed = _certificate(subject, issuer, key.public_key())
    signed = signed.add_extension(x509.SubjectAlternativeName(names), False)
    root = _certificate(issuer, issuer, authority.public_key())
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    files = TlsFiles(folder / "tls.crt", folder / "tls.key")
    for path, builder in ((files.certificate, signed), (authority_of(files), root)):
        made = builder.sign(authority, hashes.SHA256())
        path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


def authority_of(files: TlsFiles) -> pathlib.Path:
    """The file with the certificate of the authority, beside those of `make_certificates`."""
    return files.certificate.with_name("ca.crt")


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    day, now = datetime.timedelta(days=1), datetime.datetime.now(datetime.UTC)
    return x509.CertificateBuilder(
        issuer, subject, key, x509.random_serial_number(), now - day, now + day
    )
