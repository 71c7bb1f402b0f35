"""`cxrloop pull` as tests run it, and what it has brought."""

import json

from pydicom import dcmread
from typer.testing import CliRunner

from agent.cli.main import app


def pull(site, *words, code=0):
    """The JSON of `cxrloop pull`, or its stderr where it fails."""
    done = CliRunner().invoke(app, ["pull", *words, "--json", "--config", str(site.root / "appliance.toml")])
    assert done.exit_code == code, (done.exit_code, done.output, done.exception)
    return done.stderr if code == 1 else json.loads(done.stdout)


def uids(site):
    return sorted(str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in site.inbox.waiting())
