"""What a real-input run writes down: events with their second, checks that hold or not; no path of the machine.

It refuses to know what is measured; a check that fails is recorded and the run goes on.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Record:
    """The run under way. `hide` maps paths that must not be printed to the word that stands for them."""

    hide: dict[str, str]
    result: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def event(self, what: str, **facts: Any) -> None:
        """Something happened: printed, and kept with the second it happened in."""
        self.events.append({"at_s": round(time.monotonic() - self.began, 1), "what": what, **facts})
        said = ", ".join(f"{key} {value}" for key, value in facts.items())
        print(self.clean(f"{self.events[-1]['at_s']:7.1f} s  {what}: {said}"), flush=True)

    def check(self, name: str, holds: bool, found: Any = "") -> bool:
        """An invariant: kept and printed with what was found."""
        self.checks.append({"check": name, "holds": bool(holds), "found": str(found)})
        at = time.monotonic() - self.began
        print(self.clean(f"{at:7.1f} s  {'holds' if holds else 'BROKEN'}: {name} ({found})"), flush=True)
        return bool(holds)

    @property
    def broken(self) -> list[str]:
        return [check["check"] for check in self.checks if not check["holds"]]

    def clean(self, text: str) -> str:
        for path, word in self.hide.items():
            text = text.replace(path, word)
        return text

    def write(self, path: Path) -> None:
        """All of it as JSON."""
        whole = {**self.result, "events": self.events, "checks": self.checks, "broken": self.broken}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.clean(json.dumps(whole, indent=1, ensure_ascii=False)) + "\n", "utf-8")
