"""`cxrloop pull` as tests run it, and the images in the inbox after it."""

import json

from pydicom import dcmread
from typer.testing import CliRunner

from agent.cli.main import app


def pull(site, *words, code=0):
    """Run `cxrloop pull` and return its JSON, or its stderr for exit code 1."""
    result = CliRunner().invoke(app, ["pull", *words, "--json", "--config", str(site.root / "appliance.toml")])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result.stderr if code == 1 else json.loads(result.stdout)


def inbox_uids(site):
    """Return the SOP Instance UIDs of the files in the inbox, sorted."""
    return sorted(str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in site.inbox.waiting())
