"""Certificates for tests: an authority, and valid, expired or server-only certificates that it issues."""

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage
from cryptography.x509.oid import NameOID

from dicom.node.tls import Identity

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    """A certificate authority; `pem` is the file of its certificate."""

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> Path:
        return self.folder / "authority.pem"

    def issue(
        self,
        name: str,
        ca: Path | None = None,
        ends: timedelta = 90 * DAY,
        uses: tuple[x509.ObjectIdentifier, ...] = (Usage.SERVER_AUTH, Usage.CLIENT_AUTH),
        password: bytes | None = None,
    ) -> Identity:
        """Return an identity with a certificate for localhost, valid from ten days ago, that trusts `ca`."""
        key = ec.generate_private_key(ec.SECP256R1())
        hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        made = (
            _builder(name, self.certificate.subject, key, datetime.now(UTC) + ends)
            .add_extension(x509.SubjectAlternativeName(hosts), False)
            .add_extension(x509.ExtendedKeyUsage(uses), False)
            .sign(self.key, SHA256())
        )
        return _write(self.folder / name, made, key, ca, password)


def authority(folder: Path, name: str = "hospital") -> Authority:
    folder = folder / name
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        _builder(name, subject, key, datetime.now(UTC) + 900 * DAY)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, SHA256())
    )
    (folder / "authority.pem").write_bytes(made.public_bytes(Encoding.PEM))
    return Authority(folder, made, key)


def _builder(name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, ends: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - 10 * DAY)
        .not_valid_after(ends)
    )


def _write(
    stem: Path, made: x509.Certificate, key: ec.EllipticCurvePrivateKey, ca: Path | None, password: bytes | None
) -> Identity:
    cert, private = stem.with_suffix(".crt"), stem.with_suffix(".key")
    cert.write_bytes(made.public_bytes(Encoding.PEM))
    locked = BestAvailableEncryption(password) if password else NoEncryption()
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
    private.chmod(0o600)
    return Identity(cert, private, ca)
