"""The record of an acceptance run: events with their time, checks that hold or not; no path of the machine.

A check that fails is recorded, and the run continues.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Record:
    """The running record. `hide` maps paths that must not be printed to a word for each."""

    hide: dict[str, str]
    result: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def event(self, what: str, **facts: Any) -> None:
        """Print an event and keep it with its time."""
        self.events.append({"at_s": round(time.monotonic() - self.began, 1), "what": what, **facts})
        details = ", ".join(f"{key} {value}" for key, value in facts.items())
        print(self.clean(f"{self.events[-1]['at_s']:7.1f} s  {what}: {details}"), flush=True)

    def check(self, name: str, holds: bool, observed: Any = "") -> bool:
        """Print an invariant and keep it with the observed value; return whether it holds."""
        self.checks.append({"check": name, "holds": bool(holds), "found": str(observed)})
        at = time.monotonic() - self.began
        print(self.clean(f"{at:7.1f} s  {'holds' if holds else 'BROKEN'}: {name} ({observed})"), flush=True)
        return bool(holds)

    @property
    def broken(self) -> list[str]:
        """The names of the checks that failed."""
        return [check["check"] for check in self.checks if not check["holds"]]

    def clean(self, text: str) -> str:
        """Return the text with the words of `hide` in place of the paths."""
        for path, word in self.hide.items():
            text = text.replace(path, word)
        return text

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        whole = {**self.result, "events": self.events, "checks": self.checks, "broken": self.broken}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.clean(json.dumps(whole, indent=1, ensure_ascii=False)) + "\n", "utf-8")
