"""Options that several commands share, and opening the site that they name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from agent.ledger.database import Ledger
    from agent.site.site import Site

Config = Annotated[
    Path | None, typer.Option("--config", help="appliance.toml; else $CXRLOOP_CONFIG, else ./appliance.toml")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
MOST = 10**9  # of what a list may be asked for
By = Annotated[str, typer.Option(help="who does this; kept in the audit")]


@contextmanager
def open_site(settings: Path | None) -> Iterator[tuple[Site, Ledger]]:
    """Open the site of a settings file and its ledger, for one command."""
    from agent.site.site import Site

    site = Site.open(settings)
    with site.ledger() as ledger:
        yield site, ledger
