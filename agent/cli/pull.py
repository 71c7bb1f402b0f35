"""`cxrloop pull`: turns its options into an archive and an order; `agent.network.pull` fetches the images."""

from __future__ import annotations

import ipaddress
import os
import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent import console
from agent.cli.options import Config, Json, open_site
from agent.errors import Problem

if TYPE_CHECKING:
    from agent.ledger.database import Ledger
    from agent.network.pull import Tally
    from agent.site.site import Site
    from dicom.client.archive import Query
    from dicom.client.association import Peer
    from dicom.client.dicomweb import Web
    from dicom.client.dimse import Pacs

TOKEN = "CXRLOOP_PULL_TOKEN"  # environment variable: a token in an argument would show in the list of processes


def register(app: typer.Typer) -> None:
    """Add this command to the root."""
    app.command("pull")(pull_command)


def pull_command(
    source: Annotated[
        str,
        typer.Option("--from", help="AET@host:port or AET@host:port/tls, an AE title of node.peers, or https://..."),
    ],
    patient: Annotated[list[str] | None, typer.Option(help="a patient id; may be given several times")] = None,
    study: Annotated[list[str] | None, typer.Option(help="a Study Instance UID; may be given several times")] = None,
    priors: Annotated[
        bool, typer.Option("--priors", help="fetch priors of every patient with an original in the store")
    ] = False,
    since: Annotated[str, typer.Option(help="first study date, YYYY-MM-DD")] = "",
    until: Annotated[str, typer.Option(help="last study date, YYYY-MM-DD")] = "",
    modality: Annotated[str, typer.Option(help="modalities, comma-separated")] = "CR,DX",
    limit: Annotated[int, typer.Option(min=0, help="fetch at most this many images in this run; 0 = all")] = 0,
    per_minute: Annotated[int, typer.Option(min=0, help="fetch at most this many images a minute; 0 = no limit")] = 0,
    how: Annotated[str, typer.Option(help="get (C-GET) or move (C-MOVE to our own node)")] = "get",
    ca: Annotated[Path | None, typer.Option(help="certificates (PEM) of the authorities to trust for https")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only count the images that the archive has")] = False,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Fetch priors or older studies from a PACS or a DICOMweb server. Exit 3 when an image could not be fetched."""
    from agent.network.pull import Order, Puller
    from agent.site import locks
    from dicom.client.dimse import Pacs

    with console.errors(), open_site(settings) as (site, ledger):
        modalities = _modalities(modality)
        questions, unknown = _questions(site, ledger, patient or [], study or [], priors, since, until, modalities)
        archive = _archive(site, source, how, ca)
        if how == "move" and isinstance(archive, Pacs) and not dry_run:
            _reachable(site, archive.peer)
        order = Order(tuple(questions), limit, per_minute, dry_run)
        try:
            with locks.hold(site, "pull"), console.logs.status("asking") as line:
                result = Puller(site, ledger, archive, order, lambda tally: line.update(_line(tally))).run()
        except locks.Busy:
            raise Problem("another `cxrloop pull` runs on this site; wait for it, or stop it") from None
        if priors:
            result["patients_without_original"] = unknown
        if json_out:
            console.as_json(result)
        else:
            console.pairs((name, value) for name, value in result.items() if name != "reasons")
            console.pairs((f"failed: {reason}", times) for reason, times in result["reasons"].items())
    if result["failed"]:
        raise typer.Exit(3)


def _line(tally: Tally) -> str:
    done, failed = len(tally.pulled), tally.reasons.total()
    return f"pulling: {tally.studies} studies, {done} images fetched, {tally.already} here already, {failed} failed"


def _modalities(text: str) -> tuple[str, ...]:
    names = tuple(name.strip().upper() for name in text.split(",") if name.strip())
    wrong = [name for name in names if not re.fullmatch(r"[A-Z0-9_]{1,16}", name)]
    if wrong or not names:
        raise Problem(f"--modality {text}: names such as CR,DX")
    return names


def _questions(
    site: Site, ledger: Ledger, patient: list[str], study: list[str], priors: bool,
    since: str, until: str, modalities: tuple[str, ...],
) -> tuple[list[Query], int]:  # fmt: skip
    """Return the queries to the archive, in order, and how many patients of --priors have no original."""
    from agent.network.known_images import patient_ids
    from agent.network.pull import by_day
    from agent.site.config import zone
    from dicom.client.archive import Query
    from dicom.dataset.part10 import is_uid

    first, last = _day("--since", since), _day("--until", until)
    if first and last and last < first:
        raise Problem(f"--until {until} is before --since {since}")
    if priors and (patient or study):
        raise Problem("--priors excludes --patient and --study")
    for patient_id in patient:
        if not patient_id.strip() or len(patient_id) > 64 or re.search(r"[*?\\]", patient_id):
            raise Problem(f"--patient {patient_id}: one patient id of 1 to 64 characters, without wildcards")
    for uid in study:
        if not is_uid(uid):
            raise Problem(f"--study {uid}: not a Study Instance UID")
    ids = list(patient_ids(site, ledger)) if priors else [patient_id.strip() for patient_id in patient] or [""]
    if not (priors or patient or study or first or last):
        raise Problem("pull: give at least one of --patient, --study, --priors, --since and --until")
    if study or priors or patient:
        days = [(first, last)]
    else:
        days = by_day(first, last, datetime.now(UTC).astimezone(zone(site.config)).date())
    queries = [
        Query(modalities, patient=patient_id, study=uid, since=start, until=end)
        for patient_id in ids if patient_id is not None for uid in study or [""] for start, end in days
    ]  # fmt: skip
    return queries, sum(patient_id is None for patient_id in ids)


def _day(option: str, text: str) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        raise Problem(f"{option} {text}: a date is written YYYY-MM-DD") from None


def _archive(site: Site, source: str, how: str, ca: Path | None) -> Pacs | Web:
    from agent.network import connections
    from agent.site import peer_address
    from dicom.client.association import Peer
    from dicom.client.dicomweb import Web
    from dicom.client.dimse import Pacs
    from dicom.errors import ArchiveUnusable

    if how not in ("get", "move"):
        raise Problem(f"--how {how}: get or move")
    if source.startswith(("http://", "https://")):
        if ca and not ca.is_file():
            raise Problem(f"--ca {ca}: no such file")
        try:
            return Web(source, site.inbox, os.environ.get(TOKEN, ""), ca)
        except ArchiveUnusable as error:
            raise Problem(f"--from {error}") from None
    known = connections.configured_peers(site)
    try:
        named = known[source] if source in known else peer_address.parse(source)
    except ValueError:
        names = f" ({', '.join(known)})" if known else " (none is configured)"
        raise Problem(
            f'--from {source}: "AET@host:port", an AE title of node.peers{names}, or the https:// root of a DICOMweb service'
        ) from None
    context = connections.tls_context_to(site, named)
    peer = Peer(named.aet, named.host, named.port, site.config.node.aet, context)
    return Pacs(peer, site.inbox, how)


def _reachable(site: Site, peer: Peer) -> None:
    """Raise Problem, naming the setting to change, when images that the peer moves to our node can't arrive."""
    from agent.network import connections
    from dicom.client.dicomweb import LOOPBACK

    keys = site.config.node
    if not connections.node_answers(site):
        raise Problem(
            f"--how move: our own node does not answer as {keys.aet} on port {keys.port}; start `cxrloop serve`, or use --how get"
        )
    if keys.allow_aet and peer.aet not in keys.allow_aet:
        raise Problem(f"--how move: node.allow_aet lacks {peer.aet}, which will send us the images")
    if keys.host in LOOPBACK and peer.host not in LOOPBACK:
        raise Problem(f"--how move: node.host = {keys.host} can't be reached from {peer.host}; set it to 0.0.0.0")
    try:
        allowed = [ipaddress.ip_network(address, strict=False) for address in keys.allow_ip]
        if allowed and not any(ipaddress.ip_address(peer.host) in network for network in allowed):
            raise Problem(f"--how move: node.allow_ip lacks {peer.host}, which will send us the images")
    except ValueError:  # a host name: allow_ip is checked when it connects
        return
