"""Who signs images: a chain of certificates and the key of its first one.

`Signer.derived` makes both from a secret, so that every process of an installation has the same
signer. Readers call such a signature valid and its signer unknown;
`Signer.load` takes a chain and a key of the organisation's own, from an authority that they know.
"""

from __future__ import annotations

import datetime
import hashlib
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calotype.moderation.errors import ProvenanceError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

ORGANISATION = "calotype"
_FROM = datetime.datetime(2026, 1, 1)
_UNTIL = datetime.datetime(2056, 1, 1)


@dataclass(frozen=True, slots=True)
class Signer:
    """A chain of certificates, and what its first one signs with."""

    algorithm: str
    """``ed25519``, ``es256``, ``es384``, ``es512`` or ``ps256``."""
    chain: str
    """Certificates in PEM, the signing one first."""
    sign: Callable[[bytes], bytes] = field(repr=False)

    @property
    def anchor(self) -> str:
        """The last certificate of the chain: whom a reader must trust."""
        return (
            "-----BEGIN CERTIFICATE-----" + self.chain.rpartition("-----BEGIN CERTIFICATE-----")[2]
        )

    @classmethod
    def derived(cls, secret: bytes) -> Signer:
        """Key and certificates that follow from a secret: Ed25519, a root and a leaf."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding

        root, leaf = (
            Ed25519PrivateKey.from_private_bytes(
                hashlib.blake2b(name, key=secret[:64], digest_size=32).digest()
            )
            for name in (b"calotype root", b"calotype leaf")
        )
        # The name tells installations apart in a reader, and says nothing about the organisation.
        print_ = hashlib.sha256(root.public_key().public_bytes_raw()).hexdigest()[:12]
        top = _certificate(f"installation {print_}", f"installation {print_}", root, root)
        own = _certificate(f"picture signer {print_}", f"installation {print_}", leaf, root)
        chain = own.public_bytes(Encoding.PEM) + top.public_bytes(Encoding.PEM)
        return cls("ed25519", chain.decode(), leaf.sign)

    @classmethod
    def load(cls, chain: pathlib.Path, key: pathlib.Path) -> Signer:
        """Reads PEM files.

        Raises:
            ProvenanceError: a file cannot be read, or key and certificate do not belong together.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization

        try:
            text = chain.read_text(encoding="ascii")
            certificates = x509.load_pem_x509_certificates(text.encode())
        except OSError as error:
            raise ProvenanceError(f"{chain}: cannot be read ({error.strerror}).") from None
        except ValueError as error:
            raise ProvenanceError(f"{chain}: holds no certificates in PEM ({error}).") from None
        try:
            private = serialization.load_pem_private_key(key.read_bytes(), None)
        except OSError as error:
            raise ProvenanceError(f"{key}: cannot be read ({error.strerror}).") from None
        except (ValueError, TypeError) as error:
            raise ProvenanceError(
                f"{key}: holds no private key in PEM without a password ({error})."
            ) from None
        algorithm, sign = _signing(private, key)
        if certificates[0].public_key() != private.public_key():
            raise ProvenanceError(
                f"{key}: is not the key of the first certificate in {chain}; "
                "write the signing certificate first."
            )
        return cls(algorithm, text, sign)


def signature_fits(data: bytes, signature: bytes, chain: str) -> bool:
    """Whether the first certificate of a chain signed these bytes (`Signer.sign`).

    Who the signer is, is another question: compare the certificate with the one that you know.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    try:
        key = x509.load_pem_x509_certificates(chain.encode())[0].public_key()
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, data)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            digest = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}
            half = len(signature) // 2
            parts = (int.from_bytes(part, "big") for part in (signature[:half], signature[half:]))
            key.verify(encode_dss_signature(*parts), data, ec.ECDSA(digest[key.key_size]))
        elif isinstance(key, rsa.RSAPublicKey):
            pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
            key.verify(signature, data, pss, hashes.SHA256())
        else:
            return False
    except (InvalidSignature, ValueError, KeyError):
        return False
    return True


def _signing(key: PrivateKeyTypes, path: pathlib.Path) -> tuple[str, Callable[[bytes], bytes]]:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519", key.sign
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.key_size in (256, 384, 521):
        curve = key
        digest = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.key_size]
        size = -(-key.key_size // 8)

        def sign(data: bytes) -> bytes:
            der = curve.sign(data, ec.ECDSA(digest))
            return b"".join(part.to_bytes(size, "big") for part in decode_dss_signature(der))

        return f"es{8 * digest.digest_size}", sign
    if isinstance(key, rsa.RSAPrivateKey):
        private = key
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
        return "ps256", lambda data: private.sign(data, pss, hashes.SHA256())
    raise ProvenanceError(f"{path}: is neither an Ed25519, an EC P-256/384/521 nor an RSA key.")


def _certificate(
    subject: str, issuer: str, key: PrivateKeyTypes, root: PrivateKeyTypes
) -> x509.Certificate:
    """A certificate as C2PA's profile wants it (C2PA 2.2, 14.5)."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    assert isinstance(key, Ed25519PrivateKey) and isinstance(root, Ed25519PrivateKey)

    def name(common: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANISATION),
                x509.NameAttribute(NameOID.COMMON_NAME, common),
            ]
        )

    authority = key is root
    raw = key.public_key().public_bytes_raw()
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False
    )  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") | 1)
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(authority, 0 if authority else None), True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority,
                key_cert_sign=authority,
                crl_sign=authority,
                **usage,
            ),
            True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False)
    )
    if not authority:
        mail = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(mail, False)
    return builder.sign(root, None)
