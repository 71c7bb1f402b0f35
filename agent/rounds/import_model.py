"""`models import`: a model made elsewhere becomes the baseline when the site has none, else a candidate with its own round."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import Ledger
from agent.release import models, release
from agent.rounds import evaluation, records
from agent.rounds.evaluation_budget import evaluation_due
from agent.rounds.records import Round
from agent.site import locks
from agent.site.site import Site
from deploy.bundle.bundle import seal
from deploy.bundle.onnx_import import import_onnx
from deploy.errors import BundleRefused, ProviderUnavailable


def import_file(site: Site, ledger: Ledger, file: Path, by: str, evaluate: bool) -> dict[str, Any]:
    """Check, seal and register an ONNX file; return `{"bundle", "state", "is_baseline", "round", "verdict"}`.

    `evaluate`: spend an evaluation on it, also when none is due. Raises Problem where the file breaks the bundle contract.
    """
    if not file.is_file():
        raise Problem(f"{file}: no such file")
    try:
        with locks.hold(site, "round"):
            bundle = _seal(site, file)
            imported = _register(site, ledger, bundle, file, by, evaluate)
            if imported is None:
                release.put_in_service(site, ledger, models.get(ledger, bundle), by, reason="first model, ungated")
            else:
                imported = evaluation.finish(site, ledger, imported)
    except locks.Busy:
        raise Problem("models import: a round is running; wait for it, or `cxrloop round cancel`") from None
    model = models.get(ledger, bundle)
    return {
        "bundle": bundle,
        "state": model.state,
        "is_baseline": model.is_baseline,
        "round": model.round,
        "verdict": records.newest_verdict(ledger, imported) if imported else None,
    }


def _seal(site: Site, file: Path) -> str:
    """Check an ONNX file and seal it; return its bundle. Raises Problem."""
    with tempfile.TemporaryDirectory(dir=site.root / "run") as scratch:
        try:
            import_onnx(file, Path(scratch), site.findings)
        except (BundleRefused, ProviderUnavailable) as error:
            raise Problem(str(error)) from None
        return seal(Path(scratch), site.models, site.key("signing.key"))


def _register(site: Site, ledger: Ledger, bundle: str, file: Path, by: str, evaluate: bool) -> Round | None:
    """Add the bundle: as the baseline (None) when the site has no model, else as a candidate with a trained round."""
    now = datetime.now(UTC)
    with ledger.transaction():
        if ledger.row("SELECT 1 FROM bundle WHERE id = ?", bundle):
            raise Problem(f"{file}: imported already, as bundle {bundle} ({models.get(ledger, bundle).state})")
        is_first = models.in_service(ledger) is None and models.baseline(ledger) is None
        imported = None
        if not is_first:
            imported = records.add(
                ledger, now, "trained", "import", "imported", bundle=bundle, unlabelled=0, labelled=0,
                evaluate=int(evaluate or evaluation_due(site, ledger, now)),
                last_image=records.last_image_learnt(ledger),
            )  # fmt: skip
        models.add(ledger, bundle, imported.name if imported else None, is_baseline=is_first)
        audit.append(ledger, by, "bundle imported", file.name, after=bundle)
    return imported
