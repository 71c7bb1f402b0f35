"""A look: the golden set is scored by the sealed ONNX bundle on the provider that serves, and judged.

The row that spends alpha is written before any golden score is read; a crash afterwards is a spent look,
which the next start finishes. Printing a verdict never spends.
"""

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import Ledger, Row, canonical, utc
from agent.release import release
from agent.rounds import golden_set, records
from agent.site.files import open_sealed
from agent.site.site import Site
from deploy.errors import ProbeMismatch
from deploy.server.session import Session
from learner.evaluation.gate import Rules, Scores, Verdict, judge

BATCH = 32


def finish(site: Site, ledger: Ledger, name: str) -> None:
    """Take a trained round to a verdict, or to no_look with the reason."""
    row = records.get(ledger, name)
    if row["state"] == "trained":
        why_not = None if _paid(ledger, name) else _why_not(site, ledger, row)
        if why_not:
            with ledger.transaction():
                records.advance(ledger, name, "no_look", why_not)
            return
    take(site, ledger, name)


def take(site: Site, ledger: Ledger, name: str) -> Verdict:
    """Spend a look on a round's bundle (or finish the one it has paid for) and store the verdict."""
    row = records.get(ledger, name)
    paid = _paid(ledger, name) or _pay(site, ledger, row)
    verdict = _judged(site, ledger, row["bundle"], paid)
    if records.get(ledger, name)["state"] != "scored":
        with ledger.transaction():
            records.advance(ledger, name, "scored")
    lost = golden_set.lost(ledger, paid["golden"])
    said = {**verdict.to_json(), "golden": paid["golden"], "golden_lost": lost, "alpha": paid["alpha"]}
    with ledger.transaction():
        ledger.insert("verdict", look=paid["id"], outcome=verdict.outcome, json=canonical(said), at=utc())
        why = verdict.line.removeprefix(verdict.outcome.replace("_", " ") + ": ")  # the state says it already
        records.advance(ledger, name, verdict.outcome, why)
    return verdict


def _why_not(site: Site, ledger: Ledger, row: Row) -> str | None:
    """Why this round gets no look, or None."""
    if not row["look"]:
        return f"no look is due ({site.config.gate.looks_per_year} a year); `--look` spends one"
    version = golden_set.current(ledger)
    if version is None:
        return "no golden set is frozen; `cxrloop golden freeze`"
    if not ledger.value("SELECT 1 FROM golden_image WHERE version = ? LIMIT 1", version):
        return "the golden set has lost every image to `forget`; `cxrloop golden freeze`"
    if release.in_service(ledger) is None or _baseline(ledger) is None:
        return "nothing is in service to compare with"
    if records.budget(site, ledger, datetime.now(UTC))["looks_left"] <= 0:
        return "the year's alpha is spent: no decision until a look's year has passed"
    return None


def _paid(ledger: Ledger, name: str) -> Row | None:
    return ledger.row("SELECT * FROM look WHERE round = ?", name)


def _pay(site: Site, ledger: Ledger, row: Row) -> Row:
    gate = site.config.gate
    alpha = gate.alpha / gate.looks_per_year
    with ledger.transaction():
        version = golden_set.current(ledger)
        number = ledger.insert("look", round=row["name"], bundle=row["bundle"], golden=version, alpha=alpha, at=utc())
        audit.append(
            ledger, "cxrloop", "look spent", f"alpha {alpha:.6f}", after={"round": row["name"], "golden": version}
        )
    return ledger.rows("SELECT * FROM look WHERE id = ?", number)[0]


def _judged(site: Site, ledger: Ledger, bundle: str, paid: Row) -> Verdict:
    reference, plates = golden_set.load(site, ledger, paid["golden"])
    champion, baseline = release.in_service(ledger), _baseline(ledger)
    if champion is None or baseline is None:
        raise Problem("look: nothing is in service to compare with")
    done: dict[str, Scores] = {}
    for name in (bundle, champion["id"], baseline["id"]):
        if name not in done:
            done[name] = score(site, name, plates)
    return judge(
        candidate=done[bundle], champion=done[champion["id"]], baseline=done[baseline["id"]],
        golden=reference, rules=rules(site), alpha=paid["alpha"], parity=parity(site, bundle),
    )  # fmt: skip


def rules(site: Site) -> Rules:
    """The site's gate settings as the gate reads them."""
    gate = site.config.gate
    return Rules(
        margin=gate.margin, must_show=gate.must_show, superiority_required=gate.require_better, min_class=gate.min_class
    )


def score(site: Site, bundle: str, plates: list[str]) -> Scores:
    """Probabilities float [N, F] of a sealed bundle on N plates of the store, on the provider that serves."""
    sealed = open_sealed(site, bundle)
    session = Session(sealed, site.config.infer.provider, site.config.infer.threads or None)
    parts = []
    for start in range(0, len(plates), BATCH):
        batch = np.stack([site.store.plate(plate) for plate in plates[start : start + BATCH]])
        parts.append(session.predict(batch).probabilities)
    return Scores(np.concatenate(parts).astype(float), sealed.findings)


def parity(site: Site, bundle: str) -> dict[str, float]:
    """Largest |difference of probability|: torch against ONNX as the learner measured it, and the probe here."""
    sealed = open_sealed(site, bundle)
    measured = {f"batch {n}": float(sealed.card["parity"][n]) for n in ("1", "8") if sealed.card.get("parity")}
    try:
        probe = Session(sealed, site.config.infer.provider).probe() / 4  # a sigmoid's slope is at most 1/4
    except ProbeMismatch:
        probe = float("inf")
    return {**measured, "probe": probe}


def _baseline(ledger: Ledger) -> Row | None:
    return ledger.row("SELECT * FROM bundle WHERE is_baseline = 1")


def stored(site: Site, ledger: Ledger, row: Row) -> dict[str, Any]:
    """The stored verdict of a round with the budget as it is now; raises Problem when there is none."""
    found = ledger.row("SELECT v.json FROM look l JOIN verdict v ON v.look = l.id WHERE l.round = ?", row["name"])
    if not found:
        why = f": {row['reason']}" if row["reason"] else ""
        raise Problem(f"gate {row['name']}: no verdict; the round is {row['state']}{why}")
    budget = records.budget(site, ledger, datetime.now(UTC))
    return {**json.loads(found["json"]), "budget": {"spent": budget["spent"], "left": budget["left"]}}
