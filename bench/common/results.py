"""Where benchmarks write their results, and the command line that they share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def parser(doc: str | None, result: str | None = None) -> argparse.ArgumentParser:
    """Return a parser whose help is the docstring `doc`; with `result`, it has --out, by default bench/results/`result`."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if result:
        made.add_argument("--out", type=Path, default=RESULTS / result, help=f"default: bench/results/{result}")
    return made


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a result file as indented JSON; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
