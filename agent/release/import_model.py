"""`models import`: a model made elsewhere becomes the baseline when none serves, else a candidate for the gate."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import Ledger, utc
from agent.release import release
from agent.rounds import evaluation, records
from agent.site import locks
from agent.site.site import Site
from deploy.bundle.bundle import seal
from deploy.bundle.onnx_import import import_onnx
from deploy.errors import BundleRefused, ProviderUnavailable


def adopt(site: Site, ledger: Ledger, file: Path, by: str, with_look: bool) -> dict[str, Any]:
    """Check, seal and register an ONNX file; `{"bundle", "state", "is_baseline", "round", "verdict"}`.

    Raises Problem where the file does not keep the bundle contract.
    """
    if not file.is_file():
        raise Problem(f"{file}: no such file")
    try:
        bundle = _seal(site, file)
    except locks.Busy:
        raise Problem("models import: a round is running; wait for it, or `cxrloop round cancel`") from None
    if ledger.row("SELECT 1 FROM bundle WHERE id = ?", bundle):
        raise Problem(f"{file}: imported already, as bundle {bundle} ({release.find(ledger, bundle)['state']})")
    first = release.in_service(ledger) is None and not ledger.row("SELECT 1 FROM bundle WHERE is_baseline = 1")
    with ledger.transaction():
        name = None if first else _as_round(site, ledger, bundle, with_look)
        ledger.insert("bundle", id=bundle, round=name, state="candidate", is_baseline=int(first), created_at=utc())
        audit.append(ledger, by, "bundle imported", file.name, after=bundle)
    if first:
        release.put_in_service(site, ledger, bundle, by, reason="first model, ungated")
    elif name:
        evaluation.finish(site, ledger, name)
    summary = records.summary(ledger, records.get(ledger, name)) if name else None
    row = release.find(ledger, bundle)
    return {
        "bundle": bundle,
        "state": row["state"],
        "is_baseline": bool(row["is_baseline"]),
        "round": name,
        "verdict": summary["verdict"] if summary else None,
    }


def _as_round(site: Site, ledger: Ledger, bundle: str, with_look: bool) -> str:
    """A round that is trained already: the gate knows no other way in."""
    now = datetime.now(UTC)
    number = (ledger.value("SELECT max(id) FROM round") or 0) + 1
    name = f"r{number:04d}"
    ledger.insert(
        "round", id=number, name=name, state="trained", why="import", recipe="imported", bundle=bundle,
        unlabelled=0, labelled=0, look=int(with_look or records.look_due(site, ledger, now)), planned_at=utc(now),
        last_image=ledger.value("SELECT max(last_image) FROM round") or 0,
    )  # fmt: skip
    return name


def _seal(site: Site, file: Path) -> str:
    """Check an ONNX file and seal it; the bundle's id. Raises Problem, locks.Busy."""
    with locks.hold(site, "round"), tempfile.TemporaryDirectory(dir=site.root / "run") as scratch:
        try:
            import_onnx(file, Path(scratch), site.findings)
        except (BundleRefused, ProviderUnavailable) as error:
            raise Problem(str(error)) from None
        return seal(Path(scratch), site.models, site.key("signing.key"))
