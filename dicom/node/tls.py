"""TLS for the node and for what it asks of others: contexts, and what is wrong with a certificate before it is used.

The profile is BCP 195 (RFC 8996, RFC 9325) as PS3.15 B.12 takes it: TLS 1.2 or 1.3, ephemeral keys, authenticated ciphers.
Knows no sockets and no DICOM.
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

# RFC 9325 4.2: ECDHE with AES-GCM or ChaCha20-Poly1305, and nothing else; TLS 1.3 has only such suites
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
HANDSHAKE = 10  # seconds from the connection to the end of the handshake; then the peer is gone


@dataclass(frozen=True)
class Identity:
    """Who we are (certificate chain and its key) and, with `ca`, whose certificates we accept."""

    cert: Path
    key: Path
    ca: Path | None = None  # PEM: authorities, or the peers' own certificates


def check(identity: Identity, now: datetime | None = None) -> int:
    """Days until our certificate ends. Raises BadCertificate when files are missing, wrong, expired or don't match."""
    now = now or datetime.now(UTC)
    own = certificates(identity.cert)[0]
    _in_time(own, identity.cert, now)
    private = _read(identity.key)
    try:
        key = load_pem_private_key(private, None)
    except TypeError:
        raise BadCertificate(
            f"{identity.key}: protected by a pass phrase; write the key without one, mode 0600"
        ) from None
    except ValueError:
        raise BadCertificate(f"{identity.key}: not a private key (PEM)") from None
    if key.public_key() != own.public_key():
        raise BadCertificate(f"{identity.key} is not the key of {identity.cert}: name the pair that was made together")
    if identity.key.stat().st_mode & stat.S_IROTH:
        raise BadCertificate(
            f"{identity.key}: every user of this machine can read it; chmod 600 it, and renew the pair"
        )
    if identity.ca:
        for trusted in certificates(identity.ca):
            _in_time(trusted, identity.ca, now)
        _for_both_roles(own, identity.cert)
    return (own.not_valid_after_utc - now).days


def server_context(identity: Identity) -> ssl.SSLContext:
    """The node's side: with `ca` only holders of its certificates get in, and ourselves, to ask how we are."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _profile(context, identity)
    context.num_tickets = 0  # no resumption: associations are few, and a ticket is one more secret to keep
    context.options |= ssl.OP_NO_TICKET | ssl.OP_CIPHER_SERVER_PREFERENCE
    if identity.ca:
        _trust(context, certificates(identity.ca))
        _trust(context, certificates(identity.cert)[:1])
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def own_node_context(identity: Identity) -> ssl.SSLContext:
    """For C-ECHO to our own node: only the very certificate that we serve with is taken, under any name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the certificate names the appliance, we ask 127.0.0.1; it is pinned instead
    _profile(context, identity)
    _trust(context, certificates(identity.cert)[:1])
    return context


def peer_context(identity: Identity) -> ssl.SSLContext:
    """For associations that we open: the peer's certificate must be in `ca` (or the system's) and name its host."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _profile(context, identity)
    if identity.ca:
        _trust(context, certificates(identity.ca))
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context


def certificates(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, in order. Raises BadCertificate when it holds none."""
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
    """Each of these is an anchor of its own: an authority, an intermediate, or one device's certificate."""
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata="".join(one.public_bytes(Encoding.PEM).decode() for one in trusted))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCertificate(f"{path}: {error.strerror}; the node's user must be able to read it") from None


def _in_time(one: x509.Certificate, path: Path, now: datetime) -> None:
    if now > one.not_valid_after_utc:
        raise BadCertificate(f"{path}: expired on {one.not_valid_after_utc:%Y-%m-%d}; renew it, or correct the clock")
    if now < one.not_valid_before_utc:
        raise BadCertificate(f"{path}: not valid before {one.not_valid_before_utc:%Y-%m-%d}; is the clock right?")


def _for_both_roles(own: x509.Certificate, path: Path) -> None:
    """With mutual TLS we also show our certificate as a client: to our own node and to peers (RFC 5280 4.2.1.12)."""
    try:
        uses = set(own.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return
    needed = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    if not needed <= uses and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in uses:
        raise BadCertificate(
            f"{path}: with tls_ca it needs both extended key usages, serverAuth and clientAuth; have it issued so"
        )
