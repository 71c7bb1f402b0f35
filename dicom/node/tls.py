"""TLS contexts for the node and for its own associations, and checks of certificates before they are used.

The profile is BCP 195 (RFC 8996, RFC 9325) as in PS3.15 B.12: TLS 1.2 or 1.3, ephemeral keys, authenticated ciphers.
Must not import sockets or DICOM modules.
"""

import ssl
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from dicom.errors import BadCertificate

# RFC 9325 4.2: only ECDHE with AES-GCM or ChaCha20-Poly1305; TLS 1.3 has only such suites
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


@dataclass(frozen=True)
class Identity:
    """Our certificate chain and its key; with `ca`, the certificates that we accept."""

    cert: Path
    key: Path
    ca: Path | None = None  # PEM: authorities, or the peers' own certificates


def check(identity: Identity, now: datetime | None = None) -> int:
    """Return the days until our certificate expires. Raises BadCertificate when a file is missing, wrong or expired."""
    now = now or datetime.now(UTC)
    own = certificates(identity.cert)[0]
    _check_dates(own, identity.cert, now)
    private = _read(identity.key)
    try:
        key = load_pem_private_key(private, None)
    except TypeError:
        raise BadCertificate(
            f"{identity.key}: protected by a pass phrase; save the key without one, mode 0600"
        ) from None
    except ValueError:
        raise BadCertificate(f"{identity.key}: not a private key (PEM)") from None
    if key.public_key() != own.public_key():
        raise BadCertificate(
            f"{identity.key} is not the key of {identity.cert}: configure a certificate and key that belong together"
        )
    if identity.key.stat().st_mode & stat.S_IROTH:
        raise BadCertificate(
            f"{identity.key}: every user of this machine can read it; chmod 600 it, and renew the pair"
        )
    if identity.ca:
        for trusted in certificates(identity.ca):
            _check_dates(trusted, identity.ca, now)
        _check_both_roles(own, identity.cert)
    return (own.not_valid_after_utc - now).days


def server_context(identity: Identity) -> ssl.SSLContext:
    """Return the node's context. With `ca`, it accepts only clients with its certificates, and our own health check."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _profile(context, identity)
    context.num_tickets = 0  # no resumption: there are few associations, and tickets would be another secret
    context.options |= ssl.OP_NO_TICKET | ssl.OP_CIPHER_SERVER_PREFERENCE
    if identity.ca:
        _trust(context, certificates(identity.ca))
        _trust(context, certificates(identity.cert)[:1])
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def own_node_context(identity: Identity) -> ssl.SSLContext:
    """Return the context for C-ECHO to our own node: it accepts only our own certificate, under any host name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the certificate names the appliance, not 127.0.0.1; it is pinned instead
    _profile(context, identity)
    _trust(context, certificates(identity.cert)[:1])
    return context


def peer_context(identity: Identity) -> ssl.SSLContext:
    """Return the context for our associations: the peer's certificate must name its host and be trusted by `ca`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _profile(context, identity)
    if identity.ca:
        _trust(context, certificates(identity.ca))
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def certificates(path: Path) -> list[x509.Certificate]:
    """Return the certificates of a PEM file, in order. Raises BadCertificate when it contains none."""
    text = _read(path)
    try:
        return x509.load_pem_x509_certificates(text)
    except ValueError:
        raise BadCertificate(f"{path}: not a certificate (PEM)") from None


def _profile(context: ssl.SSLContext, identity: Identity) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996: 1.0 and 1.1 must not be used
    context.set_ciphers(CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.load_cert_chain(identity.cert, identity.key)


def _trust(context: ssl.SSLContext, trusted: list[x509.Certificate]) -> None:
    """Trust each of these certificates: an authority, an intermediate one, or one of a device."""
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(
        cadata="".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in trusted)
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCertificate(f"{path}: {error.strerror}; the node's user must be able to read it") from None


def _check_dates(certificate: x509.Certificate, path: Path, now: datetime) -> None:
    if now > certificate.not_valid_after_utc:
        raise BadCertificate(
            f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; renew it, or correct the clock"
        )
    if now < certificate.not_valid_before_utc:
        raise BadCertificate(
            f"{path}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d}; is the clock right?"
        )


def _check_both_roles(own: x509.Certificate, path: Path) -> None:
    """Check that our certificate may also be a client certificate, as mutual TLS requires (RFC 5280 4.2.1.12)."""
    try:
        uses = set(own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return
    needed = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    if not needed <= uses and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in uses:
        raise BadCertificate(
            f"{path}: with tls_ca it needs both extended key usages, serverAuth and clientAuth; "
            "request a new certificate with both"
        )
