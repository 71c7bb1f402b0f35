"""The golden set: the labelled images of the golden patients, frozen. Models are evaluated on it, never trained on it.

Freezing again makes a new version; alpha that was spent stays spent.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import Ledger, canonical, utc
from agent.site.site import Site

if TYPE_CHECKING:
    from learner.evaluation.gate import Golden

POOL = """
  FROM image JOIN label_now ON label_now.image = image.id
  WHERE range = 'golden' AND plate IS NOT NULL AND heartbeat = 0 AND superseded_by IS NULL AND value IS NOT NULL
"""


def freeze(site: Site, ledger: Ledger, by: str) -> dict[str, Any]:
    """Freeze the labelled images of the golden range and return `show`; unchanged images and labels keep their version."""
    rows = ledger.rows(f"SELECT image.id AS image, image.sha256, finding, value {POOL} ORDER BY image.id, finding")
    rows = [row for row in rows if row["finding"] in site.findings]
    if not rows:
        raise Problem(
            "golden freeze: no labelled image in the golden range yet; import labels (`cxrloop labels import FILE.csv`) "
            "for images whose `range` in `cxrloop images ls --json` is golden"
        )
    content = canonical([[row["sha256"], row["finding"], row["value"]] for row in rows])
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    with ledger.transaction():
        last = ledger.row("SELECT * FROM golden_set ORDER BY version DESC LIMIT 1")
        if not last or last["sha256"] != sha256:
            version = (last["version"] if last else 0) + 1
            ledger.insert("golden_set", version=version, sha256=sha256, by=by, at=utc())
            for row in rows:
                ledger.insert(
                    "golden_image", version=version, image=row["image"], finding=row["finding"], value=row["value"]
                )
            images = len({row["image"] for row in rows})
            audit.append(
                ledger, by, "golden set frozen", f"version {version}", after={"sha256": sha256, "images": images}
            )
    return show(site, ledger)


def current(ledger: Ledger) -> int | None:
    """Return the newest frozen version, or None."""
    return ledger.value("SELECT max(version) FROM golden_set")


def show(site: Site, ledger: Ledger) -> dict[str, Any]:
    """Return version, hash and sizes of the frozen set, and how many images it lost to `forget`.

    Raises Problem before there is one.
    """
    version = current(ledger)
    if version is None:
        raise Problem("no golden set is frozen: label images of the golden range, then `cxrloop golden freeze`")
    golden, _ = load(site, ledger, version)
    labels = golden.labels
    return {
        "version": version,
        "sha256": ledger.value("SELECT sha256 FROM golden_set WHERE version = ?", version),
        "images": len(labels),
        "lost": lost(ledger, version),
        "patients": len(set(golden.patients)),
        "positives": {name: int((labels[:, i] == 1).sum()) for i, name in enumerate(golden.findings)},
        "negatives": {name: int((labels[:, i] == 0).sum()) for i, name in enumerate(golden.findings)},
    }


def lost(ledger: Ledger, version: int) -> int:
    """Return how many images a frozen set lost to `forget`; its hash still covers them."""
    return ledger.value("SELECT coalesce(sum(images), 0) FROM golden_loss WHERE version = ?", version)


def load(site: Site, ledger: Ledger, version: int) -> tuple[Golden, list[str]]:
    """Return the frozen labels float [N, F] (nan = unknown) with patient keys, and the N plates' paths in the store.

    Raises Problem when `forget` has removed every image.
    """
    import numpy as np

    from learner.evaluation.gate import Golden

    rows = ledger.rows(
        "SELECT g.image, g.finding, g.value, i.patient_key, i.plate FROM golden_image g JOIN image i ON i.id = g.image "
        "WHERE g.version = ? ORDER BY g.image",
        version,
    )
    images = list(dict.fromkeys(row["image"] for row in rows))
    if not images:
        raise Problem(f"golden set version {version} has lost every image to `forget`: `cxrloop golden freeze`")
    place = {image: n for n, image in enumerate(images)}
    labels = np.full((len(images), len(site.findings)), np.nan)
    patients, plates = [""] * len(images), [""] * len(images)
    for row in rows:
        n = place[row["image"]]
        patients[n], plates[n] = row["patient_key"], row["plate"]
        if row["finding"] in site.findings and row["value"] is not None:
            labels[n, site.findings.index(row["finding"])] = row["value"]
    return Golden(labels=labels, patients=patients, findings=site.findings), plates
