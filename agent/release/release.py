"""Which model answers: approve, reject, roll back, and finishing what a crash left half done.

Every change is an intent row, then the act (load, probe, pointer), then a confirming row; the act can be
repeated, so `reconcile` simply goes on from the intent. The gate permits; only a person approves.
"""

import time
from datetime import datetime, timedelta
from typing import Any

from agent.errors import Problem, Refused
from agent.ledger import audit, states
from agent.ledger.database import Ledger, Row, utc, when
from agent.site import locks
from agent.site.site import Site
from deploy.client import Client
from deploy.errors import BundleRefused, ProviderUnavailable, ServerDown, ServerRefused

CONFLICT = 409  # the server's word that the bundle itself may not serve


def approve(site: Site, ledger: Ledger, bundle: str, by: str, reason: str) -> dict[str, Any]:
    """Let a bundle that passed the gate into service; `{"bundle", "state", "swap_seconds"}`.

    With two approvers the first call answers `requested`. Raises Refused where the verdict or the policy says no.
    """
    row = find(ledger, bundle)
    _said(by, reason)
    need = site.config.release.approvers
    with locks.wait_for(site, "release"):
        with ledger.transaction():
            _may_serve(ledger, row)
            earlier = {r["by"].casefold() for r in ledger.rows("SELECT by FROM approval WHERE bundle = ?", row["id"])}
            if by.casefold() in earlier:
                raise Refused(
                    f"approve {row['id']}: {by} has approved already; another person must (approvers = {need})"
                )
            count = len(earlier) + 1
            ledger.insert("approval", bundle=row["id"], by=by, reason=reason, at=utc())
            solo = "solo: approvers = 1" if need == 1 else f"approval {count} of {need}"
            audit.append(ledger, by, "bundle approved", reason, before=solo, after=row["id"])
            if row["state"] == "candidate":
                _advance(ledger, row["id"], "requested")
            if count < need:
                return {"bundle": row["id"], "state": "requested", "swap_seconds": None}
            intent = _intend(ledger, row["id"], by, reason)
        return _act(site, ledger, intent)


def _may_serve(ledger: Ledger, row: Row) -> None:
    if row["state"] not in ("candidate", "requested"):
        raise Refused(f"approve {row['id']}: it is {row['state']}; only a candidate can be approved (or use rollback)")
    made = ledger.row("SELECT * FROM round WHERE bundle = ?", row["id"])
    state = made["state"] if made else "never judged"
    if not made or state != "passed":
        why = (made and made["reason"]) or "no verdict yet: `cxrloop round run --now --look`, or wait for the next look"
        raise Refused(f"approve {row['id']}: the gate has not passed it ({state}: {why})")


def reject(ledger: Ledger, bundle: str, by: str, reason: str) -> dict[str, Any]:
    """Close the door on a candidate. Raises Refused when it has served already."""
    row = find(ledger, bundle)
    _said(by, reason)
    if row["state"] not in ("candidate", "requested"):
        raise Refused(
            f"reject {row['id']}: it is {row['state']}; a model in service is taken back with `cxrloop rollback`"
        )
    with ledger.transaction():
        _advance(ledger, row["id"], "rejected")
        audit.append(ledger, by, "bundle rejected", reason, before=row["state"], after=row["id"])
    return {"bundle": row["id"], "state": "rejected", "swap_seconds": None}


def rollback(site: Site, ledger: Ledger, to: str | None, by: str, reason: str) -> dict[str, Any]:
    """Put the previous bundle (or `to`) straight back into service; never gated, works with the server down."""
    _said(by, reason)
    current = in_service(ledger)
    if to is None:
        past = ledger.row(
            "SELECT d.bundle FROM deployment d JOIN bundle b ON b.id = d.bundle "
            "WHERE b.state = 'retired' ORDER BY d.id DESC LIMIT 1"
        )
        if not past:
            raise Refused("rollback: no earlier model that was not itself taken back; name one with --to BUNDLE")
        to = str(past["bundle"])
    row = find(ledger, to)
    if current and row["id"] == current["id"]:
        raise Refused(f"rollback: {row['id']} is in service already")
    if row["state"] not in ("retired", "withdrawn"):
        raise Refused(f"rollback: {row['id']} is {row['state']} and has never served; approve it instead")
    return put_in_service(site, ledger, row["id"], by, reason)


def put_in_service(site: Site, ledger: Ledger, bundle: str, by: str, reason: str) -> dict[str, Any]:
    """Intent row, load + probe, pointer, confirming row. Raises Refused when the bundle fails its own probe."""
    with locks.wait_for(site, "release"):
        with ledger.transaction():
            intent = _intend(ledger, bundle, by, reason)
        return _act(site, ledger, intent)


def _intend(ledger: Ledger, bundle: str, by: str, reason: str) -> Row:
    """The intent row, inside the caller's transaction: from here on `reconcile` finishes the deployment."""
    current = in_service(ledger)
    if find(ledger, bundle)["state"] == "candidate":
        _advance(ledger, bundle, "requested")
    number = ledger.insert(
        "deployment", bundle=bundle, state="requested", previous=current["id"] if current else None,
        by=by, reason=reason, at=utc(),
    )  # fmt: skip
    audit.append(ledger, by, "deployment requested", reason, before=current and current["id"], after=bundle)
    return ledger.rows("SELECT * FROM deployment WHERE id = ?", number)[0]


def _act(site: Site, ledger: Ledger, intent: Row) -> dict[str, Any]:
    from deploy.bundle import pointer

    bundle, by = intent["bundle"], intent["by"]
    with Client(site.infer_url) as server:
        try:
            up = _prepare(site, server, bundle)
        except (ServerRefused, BundleRefused) as error:
            if isinstance(error, ServerRefused) and error.status != CONFLICT:
                raise  # this machine's fault (GPU, disk), not the bundle's: the intent stands
            _refuse(ledger, intent, str(error))
            raise Refused(f"{bundle} was not put into service: {error}") from None
        started = time.perf_counter()
        pointer.write(site.root, bundle, intent["previous"], by, utc(), site.key("signing.key"))
        seconds = _swapped(server, bundle, started) if up else None
    return {"bundle": bundle, "state": _confirm(site, ledger, intent), "swap_seconds": seconds}


def _prepare(site: Site, server: Client, bundle: str) -> bool:
    """Load, warm and probe the bundle: in the server, or here when none is up. True when a server is up."""
    from deploy.bundle.bundle import open_bundle
    from deploy.server.session import Session

    try:
        server.prepare(bundle)
        return True
    except ServerDown:
        pass
    opened = open_bundle(site.models, bundle, site.key("signing.pub"))
    try:
        Session(opened, site.config.infer.provider).probe()
    except ProviderUnavailable as error:
        raise Problem(f"{bundle} cannot be probed here: {error}") from None
    return False


def _swapped(server: Client, bundle: str, started: float) -> float:
    """Seconds from the change of the pointer to the first answer of the new bundle."""
    import numpy as np

    try:
        server.reload()
        while server.predict(np.zeros((1, 512, 512), np.uint8))[0] != bundle:
            time.sleep(0.005)
    except (ServerDown, ServerRefused) as error:
        raise Problem(f"{bundle}: the pointer is set, but the server has not answered with it ({error})") from None
    return round(time.perf_counter() - started, 4)


def _confirm(site: Site, ledger: Ledger, intent: Row) -> str:
    bundle, previous = intent["bundle"], intent["previous"]
    with ledger.transaction():
        row = find(ledger, bundle)
        back = row["state"] in ("retired", "withdrawn")
        trial = site.config.release.probation_days > 0 and not back and not row["is_baseline"]
        state = "probation" if trial else "live"
        old = ledger.row("SELECT * FROM bundle WHERE id = ?", previous) if previous else None
        if old and old["state"] in states.IN_SERVICE:
            _advance(ledger, old["id"], "withdrawn" if back else "retired")
        _advance(ledger, bundle, state, approved_by=intent["by"])
        ledger.insert(
            "deployment",
            bundle=bundle,
            state=state,
            previous=previous,
            by=intent["by"],
            reason=intent["reason"],
            at=utc(),
        )
        audit.append(ledger, intent["by"], f"bundle {state}", intent["reason"], before=previous, after=bundle)
    return state


def _refuse(ledger: Ledger, intent: Row, why: str) -> None:
    bundle = intent["bundle"]
    with ledger.transaction():
        if find(ledger, bundle)["state"] == "requested":
            _advance(ledger, bundle, "refused")
        ledger.insert(
            "deployment",
            bundle=bundle,
            state="refused",
            previous=intent["previous"],
            by="cxrloop",
            reason=why,
            at=utc(),
        )
        audit.append(ledger, "cxrloop", "bundle refused", why, after=bundle)


def reconcile(site: Site, ledger: Ledger, now: datetime) -> None:
    """Finish a deployment that a crash interrupted, and end a probation whose days are over."""
    with locks.wait_for(site, "release"):
        intent = ledger.row("SELECT * FROM deployment ORDER BY id DESC LIMIT 1")
        if intent and intent["state"] == "requested":
            _act(site, ledger, intent)
    waiting = ledger.row("SELECT * FROM bundle WHERE is_baseline = 1 AND state = 'candidate'")
    if waiting:
        put_in_service(site, ledger, waiting["id"], by="cxrloop", reason="first model, ungated")
    current = in_service(ledger)
    if current and current["state"] == "probation":
        since = ledger.value("SELECT max(at) FROM deployment WHERE bundle = ? AND state = 'probation'", current["id"])
        if now - when(since) >= timedelta(days=site.config.release.probation_days):
            with ledger.transaction():
                _advance(ledger, current["id"], "live")
                audit.append(ledger, "cxrloop", "probation over", "no one took it back", after=current["id"])


def in_service(ledger: Ledger) -> Row | None:
    """The bundle that serves, or None."""
    return ledger.row("SELECT * FROM bundle WHERE state IN ('probation', 'live')")


def find(ledger: Ledger, name: str) -> Row:
    """A bundle by its id or by its round; raises Problem."""
    row = ledger.row("SELECT * FROM bundle WHERE id = ? OR id = (SELECT bundle FROM round WHERE name = ?)", name, name)
    if not row:
        known = ", ".join(r["id"] for r in ledger.rows("SELECT id FROM bundle ORDER BY created_at DESC LIMIT 5"))
        raise Problem(f"bundle {name!r}: no such bundle; the newest are: {known or '(none yet)'}")
    return row


def _advance(ledger: Ledger, bundle: str, state: str, approved_by: str | None = None) -> None:
    old = find(ledger, bundle)
    states.check(states.BUNDLE, f"bundle {bundle}", old["state"], state)
    ledger.run(
        "UPDATE bundle SET state = ?, approved_by = coalesce(?, approved_by) WHERE id = ? AND state = ?",
        state, approved_by, bundle, old["state"],
    )  # fmt: skip


def _said(by: str, reason: str) -> None:
    if not by.strip() or not reason.strip():
        raise Problem("--by NAME and --reason TEXT are both needed: the audit keeps who and why")
