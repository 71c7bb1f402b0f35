"""How this site speaks DICOM: its certificate, its node, its peers; and whether the node answers.

Turns settings into what `dicom` takes. Opens no port by itself and knows no image.
"""

import ipaddress
import logging
import ssl

from pydicom import Dataset

from agent.errors import Problem
from agent.site.peer_address import Peer, parse
from agent.site.site import Site
from dicom.client import sender
from dicom.node import tls
from dicom.node.listener import Node

log = logging.getLogger("cxrloop")

ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # what is listened on everywhere is asked at home


def identity(site: Site) -> tls.Identity | None:
    """Certificate, key and authorities of the site, None where it speaks no TLS; paths count from the site folder."""
    keys = site.config.node
    if not keys.tls_cert:
        return None
    return tls.Identity(
        site.root / keys.tls_cert, site.root / keys.tls_key, site.root / keys.tls_ca if keys.tls_ca else None
    )


def days_left(site: Site) -> int | None:
    """Days until our certificate ends, None without TLS. Raises Problem when TLS as configured can't work."""
    us, keys = identity(site), site.config.node
    wanting = next((text for text in (*keys.peers, site.config.results.destination) if text.endswith("/tls")), None)
    if wanting and not us:
        raise Problem(f"{wanting}: TLS needs our own certificate too; set node.tls_cert and node.tls_key")
    try:
        return tls.check(us) if us else None
    except tls.BadCertificate as wrong:
        raise Problem(f"TLS: {wrong}") from None


def node(site: Site) -> Node:
    """The node as configured. Raises Problem when its certificate can't be used.

    Our own AE title and loopback always pass: `status` and the supervisor ask the node with C-ECHO.
    """
    keys, us = site.config.node, identity(site)
    days_left(site)
    return Node(
        aet=keys.aet,
        host=keys.host,
        port=keys.port,
        allow_aet=(*keys.allow_aet, keys.aet) if keys.allow_aet else (),
        allow_ip=(*keys.allow_ip, *_ours(site)) if keys.allow_ip else (),
        max_associations=keys.max_associations,
        max_per_peer=keys.max_per_peer,
        context=tls.server_context(us) if us else None,
    )


def _ours(site: Site) -> set[str]:
    """The addresses that our own C-ECHO may come from."""
    try:
        return {"127.0.0.1", "::1", str(ipaddress.ip_address(address(site)))}
    except ValueError:  # a host name
        return {"127.0.0.1", "::1"}


def address(site: Site) -> str:
    """Where our own node is asked, from this machine."""
    return ANYWHERE.get(site.config.node.host, site.config.node.host)


def answers(site: Site) -> bool:
    """True when our own node answers C-ECHO, or says that it is busy; in TLS where it speaks TLS."""
    keys, us = site.config.node, identity(site)
    try:
        context = tls.own_node_context(us) if us else None
    except (tls.BadCertificate, OSError):  # ssl.SSLError is one: the files have gone bad since the start
        return False
    return sender.is_running(address(site), keys.port, keys.aet, calling_aet=keys.aet, tls=context)


def peers(site: Site) -> dict[str, Peer]:
    """Configured peers by AE title."""
    return {peer.aet: peer for peer in map(parse, site.config.node.peers)}


def wire(site: Site, peer: Peer) -> ssl.SSLContext | None:
    """The TLS context for an association to a peer, None for one in the clear. Raises Problem."""
    us = identity(site)
    if not peer.tls:
        return None
    if us is None:
        raise Problem(f"{peer.aet}: TLS needs our own certificate too; set node.tls_cert and node.tls_key")
    try:
        return tls.peer_context(us)
    except (tls.BadCertificate, ssl.SSLError) as wrong:
        raise Problem(f"TLS: {wrong}") from None


def report(site: Site, aet: str, information: Dataset, event_type: int) -> bool:
    """Send a storage commitment report to a configured peer; True when it has taken it."""
    peer = peers(site).get(aet)
    if peer is None:
        return False
    ours = site.config.node.aet
    try:
        status = sender.report_commitment(
            information, event_type, peer.host, peer.port, peer.aet, ours, wire(site, peer)
        )
    except (OSError, Problem) as why:  # socket.gaierror: no such host; or our certificate has gone bad
        log.warning("%s@%s:%d: %s", peer.aet, peer.host, peer.port, why)
        return False
    return status == 0
