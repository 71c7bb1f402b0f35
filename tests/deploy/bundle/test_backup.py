"""The backup and restore of docs/backup.md: the very lines that are printed there, run on a live site."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent.ledger import audit
from agent.site import config
from agent.site.site import Site, init
from deploy.bundle import pointer
from tests.support.deploy.model_server import AT, ROOT

BUNDLE = "0123456789ab"


def documented(what: str) -> str:
    """The shell block of docs/backup.md that begins with `# what:`."""
    text = (ROOT / "docs/backup.md").read_text("utf-8")
    block = re.search(rf"```sh\n(# {what}:.*?)```", text, re.S)
    assert block
    return block[1].replace("cxrloop audit verify", f"{sys.executable} -m agent.cli.main audit verify")


def run(script: str, site: Path, backup: Path) -> str:
    places = {"SITE": str(site), "BACKUP": str(backup), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, env=places, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.peer
def test_a_site_comes_back_from_its_backup_with_an_unbroken_audit(tmp_path):
    site = init(tmp_path / "site", config.checked({"site": {"findings": ["effusion"]}}))
    pointer.write(site.root, BUNDLE, None, "a test", AT, site.key("signing.key"))
    (site.root / "store/originals").mkdir(parents=True)
    (site.root / "store/originals/a.dcm").write_bytes(b"image")
    with site.ledger() as ledger:  # still open, and written to in the middle of the backup
        with ledger.transaction():
            audit.append(ledger, "a test", "before", "in the write-ahead log only")
        site.anchor(ledger)
        assert run(documented("backup"), site.root, tmp_path / "backup").strip() == "ok"
        with ledger.transaction():
            audit.append(ledger, "a test", "after", "after the backup")
    output = run(documented("restore"), tmp_path / "restored", tmp_path / "backup")
    assert "2 entries, unbroken" in output
    restored = Site.open(tmp_path / "restored/appliance.toml")
    assert pointer.read(restored.root) == pointer.read(site.root)
    assert (restored.root / "store/originals/a.dcm").read_bytes() == b"image"
    assert restored.key("pseudonym.key") == site.key("pseudonym.key")
    assert (restored.root / "keys/signing.key").stat().st_mode & 0o777 == 0o600
