"""Decide which model serves: approve, reject, roll back; finish a deployment that a crash interrupted.

A deployment is an intent row, then the act (load, probe, pointer), then a confirming row. The act can be repeated, so
`reconcile` resumes from the intent. A passed verdict permits; only a person approves.
"""

import time
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from agent.errors import Problem, Refused
from agent.ledger import audit, states
from agent.ledger.database import Ledger, utc, when
from agent.release import models
from agent.release.models import Deployment, Model
from agent.site import locks
from agent.site.site import Site
from deploy.bundle import pointer
from deploy.bundle.bundle import open_bundle
from deploy.client import Client
from deploy.errors import BundleRefused, ProviderUnavailable, ServerDown, ServerRefused
from deploy.server.session import Session

CONFLICT = 409  # the server's status when the bundle itself may not serve


def approve(site: Site, ledger: Ledger, name: str, by: str, reason: str) -> dict[str, Any]:
    """Put a bundle that passed its evaluation into service; return `{"bundle", "state", "swap_seconds"}`.

    With two approvers the first call returns the state `requested`. Raises Refused where the verdict or the policy forbids it.
    """
    bundle = models.get(ledger, name).id
    _need_name_and_reason(by, reason)
    needed = site.config.release.approvers
    with locks.wait_for(site, "release"):
        with ledger.transaction():
            model = models.get(ledger, bundle)
            _check_may_serve(ledger, model)
            earlier = {row["by"].casefold() for row in ledger.rows("SELECT by FROM approval WHERE bundle = ?", bundle)}
            if by.casefold() in earlier:
                raise Refused(
                    f"approve {bundle}: {by} has approved already; a second person must approve (approvers = {needed})"
                )
            count = len(earlier) + 1
            ledger.insert("approval", bundle=bundle, by=by, reason=reason, at=utc())
            policy = "solo: approvers = 1" if needed == 1 else f"approval {count} of {needed}"
            audit.append(ledger, by, "bundle approved", reason, before=policy, after=bundle)
            if count < needed:
                if model.state == "candidate":
                    models.advance(ledger, model, "requested")
                return {"bundle": bundle, "state": "requested", "swap_seconds": None}
            intent = _request(ledger, model, by, reason)
        return _deploy(site, ledger, intent)


def _check_may_serve(ledger: Ledger, model: Model) -> None:
    """Raise Refused unless the model is a candidate whose newest verdict passed."""
    if model.state not in ("candidate", "requested"):
        raise Refused(
            f"approve {model.id}: it is {model.state}; only a candidate can be approved (or use `cxrloop rollback`)"
        )
    maker = ledger.row("SELECT state, reason FROM round WHERE bundle = ? ORDER BY id DESC LIMIT 1", model.id)
    state, why = (maker["state"], maker["reason"]) if maker else ("never evaluated", None)
    if state != "passed":
        why = why or f"no verdict yet; `cxrloop evaluate {model.id}`, or wait for the next evaluation"
        raise Refused(f"approve {model.id}: it has not passed its evaluation ({state}: {why})")


def reject(ledger: Ledger, name: str, by: str, reason: str) -> dict[str, Any]:
    """Reject a candidate; it can no longer be approved. Raises Refused when it has served already."""
    model = models.get(ledger, name)
    _need_name_and_reason(by, reason)
    if model.state not in ("candidate", "requested"):
        raise Refused(f"reject {model.id}: it is {model.state}; take a model out of service with `cxrloop rollback`")
    with ledger.transaction():
        models.advance(ledger, model, "rejected")
        audit.append(ledger, by, "bundle rejected", reason, before=model.state, after=model.id)
    return {"bundle": model.id, "state": "rejected", "swap_seconds": None}


def rollback(site: Site, ledger: Ledger, to: str | None, by: str, reason: str) -> dict[str, Any]:
    """Put the previous bundle, or `to`, straight back into service.

    Needs no verdict and works with the server down. Raises Refused for a bundle that never served.
    """
    _need_name_and_reason(by, reason)
    current = models.in_service(ledger)
    if to is None:
        to = ledger.value(
            "SELECT d.bundle FROM deployment d JOIN bundle b ON b.id = d.bundle "
            "WHERE b.state = 'retired' ORDER BY d.id DESC LIMIT 1"
        )
        if to is None:
            raise Refused("rollback: no earlier model that was not itself withdrawn; name one with --to BUNDLE")
    model = models.get(ledger, to)
    if current and model.id == current.id:
        raise Refused(f"rollback: {model.id} is in service already")
    if model.state not in ("retired", "withdrawn"):
        raise Refused(f"rollback: {model.id} is {model.state} and has never served; approve it instead")
    return put_in_service(site, ledger, model, by, reason)


def put_in_service(site: Site, ledger: Ledger, model: Model, by: str, reason: str) -> dict[str, Any]:
    """Deploy a model: intent row, load and probe, pointer, confirming row. Raises Refused when its own probe fails."""
    with locks.wait_for(site, "release"):
        with ledger.transaction():
            intent = _request(ledger, model, by, reason)
        return _deploy(site, ledger, intent)


def _request(ledger: Ledger, model: Model, by: str, reason: str) -> Deployment:
    """Write the intent row, inside the caller's transaction; from here on `reconcile` finishes the deployment."""
    current = models.in_service(ledger)
    previous = current.id if current else None
    if models.get(ledger, model.id).state == "candidate":
        models.advance(ledger, model, "requested")
    audit.append(ledger, by, "deployment requested", reason, before=previous, after=model.id)
    return models.add_deployment(ledger, model.id, "requested", previous, by, reason)


def _deploy(site: Site, ledger: Ledger, intent: Deployment) -> dict[str, Any]:
    """Load and probe the bundle, set the pointer, confirm; return `{"bundle", "state", "swap_seconds"}`."""
    bundle = intent.bundle
    with Client(site.infer_url) as server:
        try:
            server_is_up = _prepare(site, server, bundle)
        except (ServerRefused, BundleRefused) as error:
            if isinstance(error, ServerRefused) and error.status != CONFLICT:
                raise  # the fault of this machine (GPU, disk), not of the bundle: the intent stays
            _refuse(ledger, intent, str(error))
            raise Refused(f"{bundle} was not put into service: {error}") from None
        started = time.perf_counter()
        pointer.write(site.root, bundle, intent.previous, intent.by, utc(), site.key("signing.key"))
        seconds = _wait_for_answers(server, bundle, started) if server_is_up else None
    return {"bundle": bundle, "state": _confirm(site, ledger, intent), "swap_seconds": seconds}


def _prepare(site: Site, server: Client, bundle: str) -> bool:
    """Load, warm up and probe the bundle: in the server, or here when no server runs. Return True when one runs."""
    try:
        server.prepare(bundle)
        return True
    except ServerDown:
        pass
    sealed = open_bundle(site.models, bundle, site.key("signing.pub"))
    try:
        Session(sealed, site.config.infer.provider).probe()
    except ProviderUnavailable as error:
        raise Problem(f"{bundle} cannot be probed here: {error}") from None
    return False


def _wait_for_answers(server: Client, bundle: str, started: float) -> float:
    """Return the seconds from the change of the pointer to the first answer of the new bundle."""
    try:
        server.reload()
        while server.predict(np.zeros((1, 512, 512), np.uint8))[0] != bundle:
            time.sleep(0.005)
    except (ServerDown, ServerRefused) as error:
        raise Problem(f"{bundle}: the pointer is set, but the server has not answered with it ({error})") from None
    return round(time.perf_counter() - started, 4)


def _confirm(site: Site, ledger: Ledger, intent: Deployment) -> str:
    """Write the confirming row and move both models; return the state of the new one."""
    with ledger.transaction():
        model = models.get(ledger, intent.bundle)
        is_rollback = model.state in ("retired", "withdrawn")
        on_probation = site.config.release.probation_days > 0 and not is_rollback and not model.is_baseline
        state = "probation" if on_probation else "live"
        previous = models.get(ledger, intent.previous) if intent.previous else None
        if previous and previous.state in states.IN_SERVICE:
            models.advance(ledger, previous, "withdrawn" if is_rollback else "retired")
        models.advance(ledger, model, state, approved_by=intent.by)
        models.add_deployment(ledger, model.id, state, intent.previous, intent.by, intent.reason)
        audit.append(ledger, intent.by, f"bundle {state}", intent.reason, before=intent.previous, after=model.id)
    return state


def _refuse(ledger: Ledger, intent: Deployment, why: str) -> None:
    with ledger.transaction():
        model = models.get(ledger, intent.bundle)
        if model.state == "requested":
            models.advance(ledger, model, "refused")
        models.add_deployment(ledger, model.id, "refused", intent.previous, "cxrloop", why)
        audit.append(ledger, "cxrloop", "bundle refused", why, after=model.id)


def reconcile(site: Site, ledger: Ledger, now: datetime) -> None:
    """Finish a deployment that a crash interrupted, and end a probation whose days are over."""
    with locks.wait_for(site, "release"):
        intent = models.newest_deployment(ledger)
        if intent and intent.state == "requested":
            _deploy(site, ledger, intent)
    baseline = models.baseline(ledger)
    if baseline and baseline.state == "candidate":
        put_in_service(site, ledger, baseline, by="cxrloop", reason="first model, ungated")
    current = models.in_service(ledger)
    if current and current.state == "probation":
        since = ledger.value("SELECT max(at) FROM deployment WHERE bundle = ? AND state = 'probation'", current.id)
        if now - when(since) >= timedelta(days=site.config.release.probation_days):
            with ledger.transaction():
                models.advance(ledger, current, "live")
                audit.append(ledger, "cxrloop", "probation over", "nobody rolled it back", after=current.id)


def _need_name_and_reason(by: str, reason: str) -> None:
    if not by.strip() or not reason.strip():
        raise Problem("--by NAME and --reason TEXT are both needed: the audit keeps who and why")
