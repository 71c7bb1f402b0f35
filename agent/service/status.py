"""The content of `cxrloop status`, read from counters and single rows; no table that grows is scanned."""

import shutil
from datetime import UTC, datetime, timedelta
from typing import Any

from agent.errors import Problem
from agent.ledger.database import Ledger, utc
from agent.network import connections
from agent.network.watermark import disk_full_reason
from agent.release import models
from agent.release.models import Model
from agent.results import latency, outbox
from agent.rounds import evaluation_budget, golden_set
from agent.site.config import zone
from agent.site.site import Site
from agent.site.window import next_window
from deploy.bundle import pointer
from deploy.client import Client
from deploy.errors import PointerRefused
from dicom.node import refusals

RENEW_DAYS = 30  # days of warning: a hospital's certificate authority takes weeks
NOTICE_DAYS = 7  # days that a notice stays among the alerts


def status(site: Site, ledger: Ledger) -> dict[str, Any]:
    """Return the JSON of `status`; where `degraded` is true the command exits with 3."""
    now = datetime.now(UTC)
    counters = ledger.counters()
    p50, p95 = latency.received_to_scored(ledger)
    free = shutil.disk_usage(site.root).free
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
        "gate": evaluation_budget.for_status(site, ledger, now),
        "disk": {"free_bytes": free},
        "release": {"promote": site.config.release.promote, "approvers": site.config.release.approvers},
        "alerts": alerts,
        "degraded": degraded,
    }


def _serving(ledger: Ledger, server: dict | None) -> dict[str, Any] | None:
    current = models.in_service(ledger)
    if not current:
        return None
    since = ledger.value(
        "SELECT max(at) FROM deployment WHERE bundle = ? AND state IN ('probation', 'live')", current.id
    )
    same = server is not None and server.get("bundle") == current.id
    return {
        "bundle": current.id,
        "provider": server.get("provider") if server and same else None,
        "since": since,
        "state": current.state,
        "is_baseline": current.is_baseline,
    }


def _alerts(
    site: Site, ledger: Ledger, now: datetime, free: int, server: dict | None
) -> tuple[list[dict[str, str]], bool]:
    """Return the alerts, and whether one of them means that the appliance is degraded."""
    alerts: list[tuple[str, str, bool]] = []
    keys = site.config.node
    if free < keys.min_free_mb << 20:
        detail = f"{free >> 20} MB free on {site.root}: images are refused below {keys.min_free_mb} MB; free some space"
        alerts.append(("disk", detail, True))
    elif full := disk_full_reason(free, site.config.retention.refuse_free_mb):
        alerts.append(("disk", f"{full}; free some space", True))
    alerts += _forgotten(ledger)
    host, node_up = connections.node_address(site), connections.node_answers(site)
    if not node_up and server is None:
        detail = "neither the node nor the model server answers; start both with `cxrloop serve`"
        alerts.append(("not running", detail, False))
    elif not node_up:
        detail = (
            f"{keys.aet}@{host}:{keys.port} does not answer C-ECHO, no image can arrive; see the log of `cxrloop serve`"
        )
        alerts.append(("node down", detail, True))
    elif server is None:
        detail = f"{site.infer_url} does not answer, images wait for their scores; see the log of `cxrloop serve`"
        alerts.append(("server down", detail, True))
    alerts += _certificate(site)
    alerts += outbox.alerts(site, ledger, now)
    current = models.in_service(ledger)
    if not current:
        detail = "images wait for a first model; import labels, then run `cxrloop round run --now`"
        alerts.append(("no model", detail, False))
    alerts += _pointer(site, current, server)
    if site.config.release.approvers == 1:
        detail = "one person can approve a model alone; with a second approver set release.approvers = 2"
        alerts.append(("solo", detail, False))
    week = utc(now - timedelta(days=NOTICE_DAYS))
    for row in ledger.rows("SELECT * FROM notice WHERE at > ? ORDER BY id DESC LIMIT 20", week):
        alerts.append((row["kind"], row["detail"], False))
    return [{"kind": kind, "detail": detail} for kind, detail, _ in alerts], any(degraded for *_, degraded in alerts)


def _forgotten(ledger: Ledger) -> list[tuple[str, str, bool]]:
    """Return an alert for a `forget` that is not finished, and one for a golden set that lost images to `forget`."""
    alerts: list[tuple[str, str, bool]] = []
    since = ledger.value("SELECT min(at) FROM forget WHERE state != 'done'")
    if since:
        detail = f"the `forget` of {since} is not finished; the agent finishes it while `cxrloop serve` runs"
        alerts.append(("forget", detail, True))
    version = golden_set.current(ledger)
    if version and (lost := golden_set.lost(ledger, version)):
        detail = f"version {version} lost {lost} images to `forget`; freeze a new version with `cxrloop golden freeze`"
        alerts.append(("golden set", detail, False))
    return alerts


def _certificate(site: Site) -> list[tuple[str, str, bool]]:
    """Return an alert when the node's certificate expires soon or can't be used."""
    try:
        days = connections.certificate_days_left(site)
    except Problem as wrong:
        return [("certificate", str(wrong), True)]
    if days is None or days > RENEW_DAYS:
        return []
    return [("certificate", f"node.tls_cert expires in {days} days; renew it, then restart the node", False)]


def _pointer(site: Site, current: Model | None, server: dict | None) -> list[tuple[str, str, bool]]:
    """Return alerts where ledger, signed pointer and server name different bundles, or the server runs on the CPU."""
    try:
        signed = pointer.read(site.root)
    except PointerRefused as error:
        return [("pointer", str(error), True)]
    named, wanted = signed.bundle if signed else None, current.id if current else None
    alerts: list[tuple[str, str, bool]] = []
    if named != wanted:
        detail = f"the pointer names {named}, the ledger {wanted}; `cxrloop serve` makes the pointer follow the ledger"
        alerts.append(("pointer", detail, True))
    if server and wanted and server.get("bundle") != wanted:
        why = server.get("refused") or server.get("error") or "it has not reloaded the pointer yet"
        detail = f"the model server answers with {server.get('bundle')}, not with {wanted}: {why}"
        alerts.append(("server", detail, True))
    if server and site.config.infer.provider == "auto" and server.get("provider") == "cpu":
        detail = 'scoring runs on the CPU; infer.provider = "cpu" confirms that, "cuda" makes it an error'
        alerts.append(("provider", detail, False))
    return alerts
