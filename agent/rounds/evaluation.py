"""From a round's end to its verdict: spend an evaluation, score the golden set, judge, store the verdict.

The sealed ONNX bundles score the golden set on the provider that serves. The row that spends alpha is written before any
golden score is read: a crash afterwards has spent the evaluation, and the next start finishes it.
Reads from top to bottom: every function calls only those below it.
"""

import json
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from agent.errors import Problem, Refused
from agent.ledger import audit
from agent.ledger.database import Ledger, canonical, utc
from agent.release import models
from agent.rounds import floor, golden_set, records
from agent.rounds.evaluation_budget import alpha_of_evaluation, budget
from agent.rounds.records import Round
from agent.site import locks
from agent.site.files import open_sealed
from agent.site.site import Site
from deploy.errors import ProbeMismatch, ProviderUnavailable
from deploy.server.session import Session
from learner.evaluation.floor import alert
from learner.evaluation.gate import Rules, Scores, Verdict, judge

BATCH = 32
SIGMOID_SLOPE = 1 / 4  # at most: a difference of logits times this bounds the difference of probabilities


@dataclass(frozen=True)
class Comparison:
    """What an evaluation compares; alpha is spent once for each comparison. `rules`: the gate's rules as JSON."""

    round: str
    champion: str
    baseline: str
    golden: int
    rules: str


@dataclass(frozen=True)
class Evaluation:
    """One row of the table `evaluation`: a comparison, the candidate, and the alpha that was spent."""

    id: int
    comparison: Comparison
    bundle: str
    alpha: float


def finish(site: Site, ledger: Ledger, current: Round) -> Round:
    """Take a trained or scored round to its verdict, or to `not_evaluated` with the reason; return it.

    The caller holds the lock `round`.
    """
    paid = _unfinished(ledger, current)
    if paid is None:
        yearly = site.config.gate.evaluations_per_year
        not_due = f"no evaluation is due ({yearly} a year); `cxrloop evaluate {current.name}` spends one"
        why_not = (not current.evaluate and not_due) or _missing(ledger) or _budget_spent(site, ledger)
        if why_not:
            with ledger.transaction():
                because = "; ".join(filter(None, (current.reason, why_not)))  # the notes of the learner stay
                return records.advance(ledger, current, "not_evaluated", because)
        current, paid = _spend(site, ledger, current, _comparison(site, ledger, current))
    return _decide(site, ledger, current, paid)


def evaluate(site: Site, ledger: Ledger, name: str) -> dict[str, Any]:
    """Spend one evaluation on a candidate, by its bundle or round; return `{"round", "bundle", "state", "verdict"}`.

    The same comparison spends alpha only once: later calls return its stored verdict. Raises Refused for a model that is no candidate
    and for a spent budget; Problem while a round runs, and where the site has nothing to compare with.
    """
    try:
        with locks.hold(site, "round"):
            current, verdict = _evaluate(site, ledger, name)
    except locks.Busy:
        raise Problem(f"evaluate {name}: a round is running; wait for it, or `cxrloop round cancel`") from None
    verdict |= {"budget": budget(site, ledger, datetime.now(UTC)).to_json()}
    return {"round": current.name, "bundle": current.bundle, "state": current.state, "verdict": verdict}


def _evaluate(site: Site, ledger: Ledger, name: str) -> tuple[Round, dict[str, Any]]:
    """Return the candidate's round and the verdict of the comparison, stored or new."""
    model = models.get(ledger, name)
    if model.state not in ("candidate", "requested"):
        raise Refused(f"evaluate {model.id}: it is {model.state}; only a candidate can be evaluated")
    current = records.get(ledger, model.id)
    paid = _unfinished(ledger, current)
    if paid is None:
        if missing := _missing(ledger):
            raise Problem(f"evaluate {model.id}: {missing}")
        comparison = _comparison(site, ledger, current)
        if stored := _stored_verdict(ledger, comparison):
            return current, stored
        if spent := _budget_spent(site, ledger):
            raise Refused(f"evaluate {model.id}: {spent}")
        current, paid = _spend(site, ledger, current, comparison)
    current = _decide(site, ledger, current, paid)
    verdict = records.newest_verdict(ledger, current)
    assert verdict is not None
    return current, verdict


def _unfinished(ledger: Ledger, current: Round) -> Evaluation | None:
    """Return the evaluation that was paid before a crash and has no verdict, or None."""
    row = ledger.row(
        "SELECT evaluation.* FROM evaluation LEFT JOIN verdict ON verdict.evaluation = evaluation.id "
        "WHERE round = ? AND verdict.evaluation IS NULL",
        current.name,
    )
    if row is None:
        return None
    comparison = Comparison(row["round"], row["champion"], row["baseline"], row["golden"], row["rules"])
    return Evaluation(row["id"], comparison, row["bundle"], row["alpha"])


def _missing(ledger: Ledger) -> str | None:
    """Return what the site lacks for an evaluation and what to do, or None."""
    version = golden_set.current(ledger)
    if version is None:
        return "no golden set is frozen; `cxrloop golden freeze`"
    if not ledger.value("SELECT 1 FROM golden_image WHERE version = ? LIMIT 1", version):
        return "the golden set has lost every image to `forget`; `cxrloop golden freeze`"
    if models.in_service(ledger) is None or models.baseline(ledger) is None:
        return "no model is in service to compare with"
    return None


def _budget_spent(site: Site, ledger: Ledger) -> str | None:
    """Return when the year's budget allows no evaluation, as text, or None when it allows one."""
    if budget(site, ledger, datetime.now(UTC)).evaluations_left > 0:
        return None
    return "the year's alpha is spent; no decision until the oldest evaluation is a year old"


def _comparison(site: Site, ledger: Ledger, current: Round) -> Comparison:
    """Return the comparison of this round's bundle with what serves now; call it where nothing is missing."""
    champion, baseline, golden = models.in_service(ledger), models.baseline(ledger), golden_set.current(ledger)
    assert champion and baseline and golden
    return Comparison(current.name, champion.id, baseline.id, golden, canonical(asdict(rules(site))))


def _stored_verdict(ledger: Ledger, comparison: Comparison) -> dict[str, Any] | None:
    text = ledger.value(
        "SELECT json FROM evaluation JOIN verdict ON verdict.evaluation = evaluation.id "
        "WHERE round = ? AND champion = ? AND baseline = ? AND golden = ? AND rules = ?",
        *astuple(comparison),
    )
    return json.loads(text) if text else None


def _spend(site: Site, ledger: Ledger, current: Round, comparison: Comparison) -> tuple[Round, Evaluation]:
    """Write the row that spends alpha and move the round to `scored`; raises Problem, before that, for a missing runtime."""
    bundle, alpha = current.bundle, alpha_of_evaluation(site)
    assert bundle is not None
    for name in {bundle, comparison.champion, comparison.baseline}:
        _session(site, name)  # a model that can't be loaded must not cost alpha
    with ledger.transaction():
        current = records.advance(ledger, current, "scored")
        number = ledger.insert("evaluation", bundle=bundle, alpha=alpha, at=utc(), **asdict(comparison))
        after = {"round": current.name, "golden": comparison.golden, "champion": comparison.champion}
        audit.append(ledger, "cxrloop", "evaluation spent", f"alpha {alpha:.6f}", after=after)
    return current, Evaluation(number, comparison, bundle, alpha)


def _decide(site: Site, ledger: Ledger, current: Round, paid: Evaluation) -> Round:
    """Judge the candidate of a paid evaluation, store the verdict, and move the round to its outcome."""
    verdict = _judge(site, ledger, paid)
    golden = paid.comparison.golden
    lost = golden_set.lost(ledger, golden)
    document = {**verdict.to_json(), "golden": golden, "golden_lost": lost, "alpha": paid.alpha}
    with ledger.transaction():
        if current.state == "trained":  # paid by version 0.1, which moved the round after scoring
            current = records.advance(ledger, current, "scored")
        ledger.insert("verdict", evaluation=paid.id, outcome=verdict.outcome, json=canonical(document), at=utc())
        if worse := alert(verdict.checks):
            detail = f"{paid.bundle} ({current.name}): {worse}; more labels or a pretrained backbone may help"
            ledger.insert("notice", kind="raw pixels", detail=detail, at=utc())
        because = verdict.line.removeprefix(f"{verdict.outcome}: ")
        return records.advance(ledger, current, verdict.outcome, because)


def _judge(site: Site, ledger: Ledger, paid: Evaluation) -> Verdict:
    """Score candidate, champion, baseline and raw pixels on the golden set, one after the other, and judge."""
    comparison = paid.comparison
    golden, plates = golden_set.load(site, ledger, comparison.golden)
    bundles = {paid.bundle, comparison.champion, comparison.baseline}
    scores = {bundle: score(site, bundle, plates) for bundle in sorted(bundles)}
    return judge(
        candidate=scores[paid.bundle], champion=scores[comparison.champion], baseline=scores[comparison.baseline],
        golden=golden, rules=_rules_of(site, comparison), alpha=paid.alpha, parity=_parity(site, paid.bundle),
        floor=floor.score(site, ledger, plates),
    )  # fmt: skip


def _rules_of(site: Site, comparison: Comparison) -> Rules:
    """Return the rules that were paid for; version 0.1 did not record them, so then the site's present ones."""
    if not comparison.rules:
        return rules(site)
    keys = json.loads(comparison.rules)
    return Rules(**keys | {"must_show": tuple(keys["must_show"])})


def rules(site: Site) -> Rules:
    """Return the site's gate settings as the gate reads them."""
    gate = site.config.gate
    return Rules(
        margin=gate.margin, must_show=gate.must_show, superiority_required=gate.require_better, min_class=gate.min_class
    )


def score(site: Site, bundle: str, plates: list[str]) -> Scores:
    """Return probabilities float [N, F] of a sealed bundle on N plates of the store, on the provider that serves."""
    session = _session(site, bundle)
    parts = []
    for start in range(0, len(plates), BATCH):
        batch = np.stack([site.store.plate(plate) for plate in plates[start : start + BATCH]])
        parts.append(session.predict(batch).probabilities)
    return Scores(np.concatenate(parts).astype(float), session.bundle.findings)


def _parity(site: Site, bundle: str) -> dict[str, float]:
    """Return the largest differences in probability, torch against ONNX: by batch size as the learner measured them on its
    validation images, and "probe" as measured here."""
    card = open_sealed(site, bundle).card
    measured = {f"batch {size}": float(card["parity"][size]) for size in ("1", "8") if card.get("parity")}
    try:
        probe = _session(site, bundle).probe() * SIGMOID_SLOPE
    except ProbeMismatch:
        probe = float("inf")
    return {**measured, "probe": probe}


def _session(site: Site, bundle: str) -> Session:
    """Load a sealed bundle in this process; raises Problem where the runtime or the provider is missing."""
    sealed = open_sealed(site, bundle)
    try:
        return Session(sealed, site.config.infer.provider, site.config.infer.threads or None)
    except ProviderUnavailable as error:
        raise Problem(f"{bundle} cannot be scored here: {error}") from None
