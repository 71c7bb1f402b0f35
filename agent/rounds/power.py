"""`golden power`: the statistical power of the next evaluation, per finding, at the correlation of the site's own scores."""

from datetime import UTC, datetime
from typing import Any

from agent.errors import Problem
from agent.ledger.database import Ledger
from agent.release import models
from agent.rounds import evaluation, golden_set
from agent.rounds.evaluation_budget import alpha_of_evaluation, budget
from agent.site.site import Site
from learner.evaluation.gate import golden_power


def power(site: Site, ledger: Ledger) -> dict[str, Any]:
    """Return, per finding, `positives`, `negatives`, `auc`, `correlation`, `power_per_evaluation` and `evaluations_left`.

    `power_per_look` and `looks_left` repeat the last two under their names of version 0.1. Measured on the model in service
    and the bundle that was evaluated last; before there is one, correlation and power are None. Raises Problem before there
    is a golden set or a model.
    """
    version = golden_set.current(ledger)
    if version is None:
        raise Problem("golden power: no golden set is frozen; label golden images, then `cxrloop golden freeze`")
    champion = models.in_service(ledger)
    if not champion:
        raise Problem("golden power: no model is in service whose scores could be measured")
    golden, plates = golden_set.load(site, ledger, version)
    scores = evaluation.score(site, champion.id, plates)
    second = ledger.value("SELECT bundle FROM evaluation WHERE bundle != ? ORDER BY id DESC LIMIT 1", champion.id)
    second_scores = evaluation.score(site, second, plates) if second else scores
    rows = golden_power(second_scores, scores, golden, evaluation.rules(site), alpha_of_evaluation(site))
    left = budget(site, ledger, datetime.now(UTC)).evaluations_left
    return {
        row.finding: {
            "positives": row.positives,
            "negatives": row.negatives,
            "auc": row.auc,
            "correlation": row.correlation if second else None,
            "power_per_evaluation": row.power if second else None,
            "power_per_look": row.power if second else None,
            "evaluations_left": left,
            "looks_left": left,
        }
        for row in rows
    }
