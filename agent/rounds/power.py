"""`golden power`: how likely one look is to decide, per finding, at the correlation of this site's own scores."""

from datetime import UTC, datetime
from typing import Any

from agent.errors import Problem
from agent.ledger.database import Ledger
from agent.release import release
from agent.rounds import evaluation, golden_set, records
from agent.site.site import Site
from learner.evaluation.gate import golden_power


def power(site: Site, ledger: Ledger) -> dict[str, Any]:
    """`{finding: {"positives", "negatives", "correlation", "power_per_look", "looks_left"}}`.

    Measured on the model in service and the newest other bundle that has had its look; before there is one,
    correlation and power are null. Raises Problem before there are golden labels or a model.
    """
    version = golden_set.current(ledger)
    if version is None:
        raise Problem("golden power: no golden set is frozen; label golden images, then `cxrloop golden freeze`")
    champion = release.in_service(ledger)
    if not champion:
        raise Problem("golden power: no model is in service whose scores could be measured")
    reference, plates = golden_set.load(site, ledger, version)
    scores = evaluation.score(site, champion["id"], plates)
    other = ledger.value("SELECT bundle FROM look WHERE bundle != ? ORDER BY id DESC LIMIT 1", champion["id"])
    gate = site.config.gate
    rules, alpha = evaluation.rules(site), gate.alpha / gate.evaluations_per_year
    found = golden_power(evaluation.score(site, other, plates) if other else scores, scores, reference, rules, alpha)
    left = records.budget(site, ledger, datetime.now(UTC))["looks_left"]
    return {
        row.finding: {
            "positives": row.positives,
            "negatives": row.negatives,
            "auc": row.auc,
            "correlation": row.correlation if other else None,
            "power_per_look": row.power if other else None,
            "looks_left": left,
        }
        for row in found
    }
