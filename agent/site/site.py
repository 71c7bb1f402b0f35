"""One site on disk: the folder that `init` makes, its settings, keys, ledger and store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from agent.errors import Problem
from agent.ledger import audit
from agent.ledger.database import Ledger
from agent.site import config
from dicom.store.inbox import Inbox

if TYPE_CHECKING:
    from dicom.store.store import Store

FOLDERS = ("inbox", "node", "drop", "store", "rounds", "models", "run", "keys")


@dataclass(frozen=True)
class Site:
    """The folder of a site and its settings. Opening it creates missing folders and migrates the ledger."""

    root: Path
    config: config.Config

    @classmethod
    def open(cls, settings: Path | None = None) -> Site:
        """Return the site of a settings file (see `config.config_path`); raises Problem when a key file is missing."""
        path = config.config_path(settings)
        site = cls(path.parent, config.load(path))
        for name in ("pseudonym.key", "signing.key", "signing.pub"):
            if not (site.root / "keys" / name).is_file():
                raise Problem(
                    f"{site.root / 'keys' / name} is missing: restore it from the backup; a new key can't replace it"
                )
        for name in FOLDERS:
            (site.root / name).mkdir(exist_ok=True)
        return site

    def key(self, name: str) -> bytes:
        """Return a key of the site: pseudonym.key, signing.key or signing.pub (32 bytes each)."""
        return (self.root / "keys" / name).read_bytes()

    @property
    def findings(self) -> tuple[str, ...]:
        return self.config.site.findings

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def rounds(self) -> Path:
        return self.root / "rounds"

    @cached_property
    def store(self) -> Store:
        from dicom.store.store import Store

        return Store(self.root / "store")

    @cached_property
    def inbox(self) -> Inbox:
        return Inbox(self.root / "inbox", min_free_bytes=self.config.node.min_free_mb << 20)

    @property
    def infer_url(self) -> str:
        return f"http://{self.config.infer.host}:{self.config.infer.port}"

    @contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """Open the ledger for one piece of work; at its end the head of the audit log is signed."""
        with Ledger(self.root / "ledger.db") as ledger:
            try:
                yield ledger
            finally:
                self.anchor(ledger)

    def anchor(self, ledger: Ledger) -> None:
        """Sign the newest audit entry into the file audit.heads."""
        audit.anchor(ledger, self.root / "audit.heads", self.key("signing.key"))


def init(folder: Path, settings: config.Config) -> Site:
    """Create a site folder: settings with every key commented, keys, folders, ledger.

    Raises Problem when the folder already holds a site: keys are never replaced.
    """
    from deploy.bundle.keys import new_keys

    path = folder / "appliance.toml"
    if path.exists() or (folder / "keys").exists():
        raise Problem(f"{folder} already holds a site; edit {path}, or choose another folder")
    (folder / "keys").mkdir(parents=True, mode=0o700)
    pseudonym = folder / "keys" / "pseudonym.key"
    descriptor = os.open(pseudonym, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(os.urandom(32))
        os.fsync(file.fileno())
    new_keys(folder / "keys")
    path.write_text(config.template(settings), "utf-8")
    site = Site.open(path)
    with site.ledger() as ledger, ledger.transaction():
        audit.append(ledger, "cxrloop init", "site made", "init", after={"findings": list(settings.site.findings)})
    return site
