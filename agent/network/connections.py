"""DICOM connections of this site: its certificate, its node, its peers; and a C-ECHO to its own node.

Turns settings into the values that `dicom` takes. Opens no port and reads no image.
"""

from __future__ import annotations

import ipaddress
import logging
import ssl
from typing import TYPE_CHECKING

from agent.errors import Problem
from agent.site.peer_address import PeerAddress, parse
from agent.site.site import Site
from dicom.client import echo
from dicom.errors import BadCertificate

if TYPE_CHECKING:
    from pydicom import Dataset

    from dicom.node import tls
    from dicom.node.listener import Node

log = logging.getLogger("cxrloop")

LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # a node on a wildcard address is probed through loopback


def tls_identity(site: Site) -> tls.Identity | None:
    """Return the site's certificate, key and trusted authorities, None without TLS; paths start at the site folder."""
    keys = site.config.node
    if not keys.tls_cert:
        return None
    from dicom.node import tls

    return tls.Identity(
        site.root / keys.tls_cert, site.root / keys.tls_key, site.root / keys.tls_ca if keys.tls_ca else None
    )


def certificate_days_left(site: Site) -> int | None:
    """Return the days until our certificate ends, None without TLS; raises Problem when TLS can't work."""
    identity, keys = tls_identity(site), site.config.node
    with_tls = next((text for text in (*keys.peers, site.config.results.destination) if text.endswith("/tls")), None)
    if with_tls and not identity:
        raise Problem(f"{with_tls}: TLS needs a certificate of our own; set node.tls_cert and node.tls_key")
    if identity is None:
        return None
    from dicom.node import tls

    try:
        return tls.check(identity)
    except BadCertificate as error:
        raise Problem(f"TLS: {error}") from None


def node_settings(site: Site) -> Node:
    """Return the node as configured; raises Problem when its certificate can't be used.

    Our own AE title and loopback are always allowed: `status` and the supervisor send C-ECHO to the node.
    """
    from dicom.node import tls
    from dicom.node.listener import Node

    keys, identity = site.config.node, tls_identity(site)
    certificate_days_left(site)
    return Node(
        aet=keys.aet,
        host=keys.host,
        port=keys.port,
        allow_aet=(*keys.allow_aet, keys.aet) if keys.allow_aet else (),
        allow_ip=(*keys.allow_ip, *_own_addresses(site)) if keys.allow_ip else (),
        max_associations=keys.max_associations,
        max_per_peer=keys.max_per_peer,
        context=tls.server_context(identity) if identity else None,
    )


def _own_addresses(site: Site) -> set[str]:
    """Return the addresses from which our own C-ECHO may come."""
    try:
        return {"127.0.0.1", "::1", str(ipaddress.ip_address(node_address(site)))}
    except ValueError:  # a host name
        return {"127.0.0.1", "::1"}


def node_address(site: Site) -> str:
    """Return the address under which this machine reaches its own node."""
    return LOOPBACK_OF.get(site.config.node.host, site.config.node.host)


def node_answers(site: Site) -> bool:
    """Return True when our own node answers C-ECHO or is at its association limit; over TLS where it uses TLS."""
    keys, identity = site.config.node, tls_identity(site)
    context = None
    if identity:
        from dicom.node import tls

        try:
            context = tls.own_node_context(identity)
        except (BadCertificate, OSError):  # an ssl.SSLError is an OSError: the files were damaged since the start
            return False
    return echo.is_running(node_address(site), keys.port, keys.aet, keys.aet, context)


def configured_peers(site: Site) -> dict[str, PeerAddress]:
    """Return the peers of `node.peers` by AE title."""
    return {peer.aet: peer for peer in map(parse, site.config.node.peers)}


def tls_context_to(site: Site, peer: PeerAddress) -> ssl.SSLContext | None:
    """Return the TLS context for an association to a peer, None for a peer without TLS; raises Problem."""
    identity = tls_identity(site)
    if not peer.tls:
        return None
    if identity is None:
        raise Problem(f"{peer.aet}: TLS needs a certificate of our own; set node.tls_cert and node.tls_key")
    from dicom.node import tls

    try:
        return tls.peer_context(identity)
    except (BadCertificate, ssl.SSLError) as error:
        raise Problem(f"TLS: {error}") from None


def send_commitment_report(site: Site, aet: str, information: Dataset, event_type: int) -> bool:
    """Send a storage commitment report to a configured peer; return True when the peer accepted it."""
    from dicom.client import sender

    peer = configured_peers(site).get(aet)
    if peer is None:
        return False
    try:
        context = tls_context_to(site, peer)
        status = sender.report_commitment(
            information, event_type, peer.host, peer.port, peer.aet, site.config.node.aet, context
        )
    except (OSError, Problem) as error:  # socket.gaierror: no such host; or our certificate can't be used any more
        log.warning("no commitment report to %s@%s:%d: %s", peer.aet, peer.host, peer.port, error)
        return False
    return status == 0
