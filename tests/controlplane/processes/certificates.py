"""A certificate authority for one control plane, and the kubeconfigs that it signs."""

import base64
import datetime
import ipaddress
import json
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = datetime.timedelta(days=2)
# A machine that restored an older clock must still accept what is signed now.
EARLIER = datetime.timedelta(hours=1)
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class CertificateAuthority:
    """Signs server and client certificates; every file lies in `folder`, readable by its owner."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("calotype tests", ())
        self._certificate = self._sign(self._name, self._key.public_key(), ca=True)
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM)
        self.file = write_private(folder / "ca.crt", self.pem)

    def server(self, file: str, names: Sequence[str]) -> tuple[Path, Path]:
        """Certificate and key of a server that answers to these host names and addresses."""
        return self._issue(file, file, (), names)

    def client(self, file: str, user: str, groups: Sequence[str] = ()) -> tuple[Path, Path]:
        """Certificate and key of a user of Kubernetes in its groups."""
        return self._issue(file, user, groups, ())

    def kubeconfig(self, path: Path, server: str, user: str, groups: Sequence[str] = ()) -> Path:
        """A kubeconfig with a fresh client certificate, as JSON, which kubectl reads as YAML."""
        certificate, key = self.client(path.stem, user, groups)
        credentials = {
            "client-certificate-data": _base64(certificate.read_bytes()),
            "client-key-data": _base64(key.read_bytes()),
        }
        return write_kubeconfig(path, server, self.pem, user, credentials)

    def signing_key(self) -> tuple[Path, Path]:
        """Private and public key for the tokens of ServiceAccounts."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        private = write_private(self.folder / "accounts.key", _pem(key))
        return private, write_private(self.folder / "accounts.pub", public)

    def _issue(
        self, file: str, user: str, groups: Sequence[str], names: Sequence[str]
    ) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        signed = self._sign(_name(user, groups), key.public_key(), names)
        certificate = signed.public_bytes(serialization.Encoding.PEM)
        return (
            write_private(self.folder / f"{file}.crt", certificate),
            write_private(self.folder / f"{file}.key", _pem(key)),
        )

    def _sign(
        self,
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        names: Sequence[str] = (),
        ca: bool = False,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - EARLIER)
            .not_valid_after(now + VALID)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            usage = ExtendedKeyUsageOID.SERVER_AUTH if names else ExtendedKeyUsageOID.CLIENT_AUTH
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if names:
            alternatives = x509.SubjectAlternativeName([_alternative(name) for name in names])
            builder = builder.add_extension(alternatives, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def write_kubeconfig(
    path: Path, server: str, authority: bytes, user: str, credentials: dict[str, str]
) -> Path:
    """A kubeconfig of one cluster, one user and one context, readable by its owner."""
    cluster = {"server": server, "certificate-authority-data": _base64(authority)}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "tests",
        "clusters": [{"name": "tests", "cluster": cluster}],
        "users": [{"name": user, "user": credentials}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": user}}],
    }
    return write_private(path, json.dumps(config).encode())


def write_private(path: Path, content: bytes) -> Path:
    """Writes a file that only its owner may read."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    return path


def _name(user: str, groups: Sequence[str]) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, user)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
