"""What `cxrloop status` says: read from counters and single rows, never by scanning."""

import shutil
from datetime import UTC, datetime, timedelta
from typing import Any

from agent.errors import Problem
from agent.ledger.database import Ledger, utc
from agent.network import connections
from agent.network.watermark import disk_full_reason
from agent.release import release
from agent.results import latency, outbox
from agent.rounds import golden_set, records
from agent.site.config import zone
from agent.site.site import Site
from agent.site.window import next_window
from deploy.bundle import pointer
from deploy.client import Client
from deploy.errors import PointerRefused
from dicom.node import refusals

RENEW_DAYS = 30  # a hospital's certificate authority takes its time
NOTICE_DAYS = 7  # how long a notice stays in the alerts


def status(site: Site, ledger: Ledger) -> dict[str, Any]:
    """The JSON of `status`; `degraded` tells the command to exit 3."""
    now = datetime.now(UTC)
    counters = ledger.counters()
    p50, p95 = latency.received_to_scored(ledger)
    free = shutil.disk_usage(site.root).free
    budget = records.budget(site, ledger, now)
    with Client(site.infer_url) as client:
        server = client.state()
    alerts, degraded = _alerts(site, ledger, now, free, server)
    last = ledger.row("SELECT * FROM round ORDER BY id DESC LIMIT 1")
    upcoming = next_window(now, site.config.learn.window, zone(site.config))
    return {
        "site": site.config.site.name,
        "ingest": {
            "inbox": len(site.inbox.waiting()),
            "stored": counters["stored"],
            "rejected": counters["rejected"],
            "quarantined": counters["quarantined"],
            "refused": sum(refusals.read_counts(site.root / "node" / "refused.json").values()),
            "predicted": counters["predicted"],
            "returned": counters["returned"],
            "labelled": counters["labelled"],
            "p50_s": p50,
            "p95_s": p95,
        },
        "outbox": outbox.state(ledger),
        "serving": _serving(ledger, server),
        "rounds": {
            "next": utc(upcoming) if upcoming else None,
            "last": {"round": last["name"], "state": last["state"], "reason": last["reason"]} if last else None,
        },
        "gate": {"looks_left": budget["looks_left"], "alpha_left": budget["left"]},
        "disk": {"free_bytes": free},
        "release": {"promote": site.config.release.promote, "approvers": site.config.release.approvers},
        "alerts": alerts,
        "degraded": degraded,
    }


def _serving(ledger: Ledger, server: dict | None) -> dict[str, Any] | None:
    current = release.in_service(ledger)
    if not current:
        return None
    since = ledger.value(
        "SELECT max(at) FROM deployment WHERE bundle = ? AND state IN ('probation', 'live')", current["id"]
    )
    same = server is not None and server.get("bundle") == current["id"]
    return {
        "bundle": current["id"],
        "provider": server.get("provider") if server and same else None,
        "since": since,
        "state": current["state"],
        "is_baseline": bool(current["is_baseline"]),
    }


def _alerts(
    site: Site, ledger: Ledger, now: datetime, free: int, server: dict | None
) -> tuple[list[dict[str, str]], bool]:
    """What a person should know, and whether something that should work does not."""
    found: list[tuple[str, str, bool]] = []
    keys = site.config.node
    if free < keys.min_free_mb << 20:
        found.append(("disk", f"{free >> 20} MB free, images are refused under {keys.min_free_mb} MB", True))
    elif full := disk_full_reason(free, site.config.retention.refuse_free_mb):
        found.append(("disk", full, True))
    found += _forgotten(ledger)
    host, node_up = connections.node_address(site), connections.node_answers(site)
    if not node_up and server is None:
        found.append(("not running", "neither the node nor the model server answers: `cxrloop serve`", False))
    elif not node_up:
        found.append(("node down", f"no C-ECHO from {keys.aet}@{host}:{keys.port}", True))
    elif server is None:
        found.append(("server down", f"no answer from {site.infer_url}; images wait unscored", True))
    found += _certificate(site)
    found += outbox.alerts(site, ledger, now)
    current = release.in_service(ledger)
    if not current:
        found.append(("no model", "images are stored and wait; label some, then `cxrloop round run --now`", False))
    found += _pointer(site, current, server)
    if site.config.release.approvers == 1:
        found.append(("solo", "one person approves alone (release.approvers = 1)", False))
    week = utc(now - timedelta(days=NOTICE_DAYS))
    for row in ledger.rows("SELECT * FROM notice WHERE at > ? ORDER BY id DESC LIMIT 20", week):
        found.append((row["kind"], row["detail"], False))
    return [{"kind": kind, "detail": detail} for kind, detail, _ in found], any(bad for *_, bad in found)


def _forgotten(ledger: Ledger) -> list[tuple[str, str, bool]]:
    """A `forget` that is not done yet, and what the frozen golden set has lost to one."""
    found: list[tuple[str, str, bool]] = []
    since = ledger.value("SELECT min(at) FROM forget WHERE state != 'done'")
    if since:
        found.append(("forget", f"begun {since}, not done yet; the agent goes on by itself (`cxrloop serve`)", True))
    version = golden_set.current(ledger)
    if version and (lost := golden_set.lost(ledger, version)):
        detail = f"version {version} lost {lost} images to `forget`; verdicts are on the rest: `cxrloop golden freeze`"
        found.append(("golden set", detail, False))
    return found


def _certificate(site: Site) -> list[tuple[str, str, bool]]:
    """Whether the node's certificate ends soon, or can't be used any more."""
    try:
        days = connections.certificate_days_left(site)
    except Problem as wrong:
        return [("certificate", str(wrong), True)]
    if days is None or days > RENEW_DAYS:
        return []
    return [("certificate", f"node.tls_cert ends in {days} days; renew it and restart the node", False)]


def _pointer(site: Site, current: dict | None, server: dict | None) -> list[tuple[str, str, bool]]:
    """Whether the ledger, the signed pointer and the server name the same bundle, on the provider asked for."""
    try:
        signed = pointer.read(site.root)
    except PointerRefused as error:
        return [("pointer", str(error), True)]
    named, wanted = signed.bundle if signed else None, current["id"] if current else None
    found: list[tuple[str, str, bool]] = []
    if named != wanted:
        found.append(("pointer", f"the pointer names {named}, the ledger {wanted}; `cxrloop serve` settles it", True))
    if server and wanted and server.get("bundle") != wanted:
        found.append(
            (
                "server",
                f"answers with {server.get('bundle')}: {server.get('refused') or server.get('error') or 'not yet reloaded'}",
                True,
            )
        )
    if server and site.config.infer.provider == "auto" and server.get("provider") == "cpu":
        found.append(("provider", "scoring runs on the CPU", False))
    return found
