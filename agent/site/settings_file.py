"""Where the settings file of a site is. Must not import pydantic: the Tab key asks this too."""

import os
from pathlib import Path

from agent.errors import Problem


def settings_path(named: Path | None) -> Path:
    """Return the settings file: the path named, else $CXRLOOP_CONFIG, else ./appliance.toml; it may not exist."""
    path = named or Path(os.environ.get("CXRLOOP_CONFIG") or "appliance.toml")
    return path / "appliance.toml" if path.is_dir() else path


def config_path(named: Path | None) -> Path:
    """Return the settings file, resolved; raises Problem when there is none."""
    path = settings_path(named)
    if not path.is_file():
        raise Problem(f"{path}: no such settings file; run `cxrloop init DIR`, then pass --config DIR/appliance.toml")
    return path.resolve()
