"""A site that is ready for a round: two dozen labelled images and a tiny recipe."""

from pathlib import Path

from agent.images import labels
from agent.site.site import Site
from tests.conftest import make_site
from tests.support.agent.appliance import TINY
from tests.support.agent.crash_line import write_labels
from tests.support.agent.images import put, take_in, xray


def labelled_site(folder: Path, epochs: int = 2, **learn: str | int) -> Site:
    """Make the site under `folder`; `learn` are settings of that section."""
    site = make_site(folder / "site", learn={"recipe": "tiny.toml", **learn})
    (site.root / "tiny.toml").write_text(TINY.replace("\nepochs = 2", f"\nepochs = {epochs}"))
    with site.ledger() as ledger:
        for seed in range(24):
            put(site, xray(seed), f"{seed}.dcm")
        take_in(site, ledger)
        rows = ledger.rows("SELECT sop_uid FROM image")
        write_labels(folder / "labels.csv", [(row["sop_uid"], "effusion", n % 2) for n, row in enumerate(rows)])
        labels.import_csv(site, ledger, folder / "labels.csv", "test")
    return site
