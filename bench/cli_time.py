"""Processor time (user + system) of short commands, beside another checkout if one is named, interleaved run by run.

Each checkout gets its own copy of SITE, which is a site that version 0.1.0 left; its ledger is migrated before the first
measured run. Commands run without an appliance and beside a running one. Processor time is that of the whole process,
the start of the interpreter included; a part is the median of `--runs`.

    python bench/cli_time.py [--runs 9] [--beside CHECKOUT_OR_PYTHON] [--site tests/sites/0.1.0]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.ports import free_ports

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "cli_time.json"
COMMANDS = {  # what is measured, under the names of every version
    "--version": (["--version"],),
    "--help": (["--help"],),
    "status": (["status"],),
    "images ls": (["images", "ls"], ["studies", "ls"]),
    "models ls": (["models", "ls"],),
    "verdict ROUND": (["verdict", "r0002"], ["gate", "r0002"]),
}
LIMIT_S = {"--version": 0.25, "--help": 0.25}  # on the 2-core machine of the benchmarks; every other command: OTHER_S
OTHER_S = 0.6
ENTRY = "import sys; from {module} import main; sys.exit(main())"  # what the installed console script runs
READY_S = 120


@dataclass(frozen=True)
class Checkout:
    """A source tree with the interpreter that runs it, and the copy of the site that it works on."""

    name: str
    python: str
    tree: Path | None  # None: the packages that this interpreter has installed
    site: Path

    @property
    def environment(self) -> dict[str, str]:
        without = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CXRLOOP_CONFIG")}
        return without | ({"PYTHONPATH": str(self.tree)} if self.tree else {})

    def starts(self) -> dict[str, list[str]]:
        """Return the command lines that start the program: as `python -m` and as the console script does."""
        nested = "import importlib.util as u; print('agent.cli.main' if u.find_spec('agent.cli').submodule_search_locations else 'agent.cli')"
        module = subprocess.check_output([self.python, "-c", nested], env=self.environment, text=True).strip()
        return {
            "python -m": [self.python, "-m", module],
            "console script": [self.python, "-c", ENTRY.format(module=module)],
        }


def checkout(name: str, where: Path, site: Path, folder: Path) -> Checkout:
    """Return the checkout that a folder or an interpreter stands for, with a fresh copy of the site on free ports."""
    copied = folder / name
    shutil.copytree(site, copied)
    settings = copied / "appliance.toml"
    ports = iter(free_ports(2))
    text = re.sub(r"^port = \d+$", lambda _: f"port = {next(ports)}", settings.read_text("utf-8"), flags=re.M)
    settings.write_text(text, "utf-8")
    return Checkout(name, sys.executable, where, copied) if where.is_dir() else Checkout(name, str(where), None, copied)


def processor_seconds(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Run a command without showing what it writes; return its user + system seconds and its exit status."""
    nothing = [(os.POSIX_SPAWN_OPEN, handle, os.devnull, os.O_RDWR, 0) for handle in (0, 1, 2)]
    pid = os.posix_spawn(command[0], command, environment, file_actions=nothing)
    _, status, usage = os.wait4(pid, 0)
    return usage.ru_utime + usage.ru_stime, os.waitstatus_to_exitcode(status)


def words_for(side: Checkout, start: list[str], spellings: tuple[list[str], ...]) -> list[str]:
    """Return the command line under the first name that this checkout knows; this run migrates the ledger, too."""
    for words in spellings:
        line = [*start, *words, *([] if words[0].startswith("-") else ["--config", str(side.site / "appliance.toml")])]
        if processor_seconds(line, side.environment)[1] in (0, 3):
            return line
    raise SystemExit(f"{side.name}: none of {spellings} works")


@contextlib.contextmanager
def serving(side: Checkout) -> Iterator[None]:
    """Run the appliance of a checkout on its site."""
    line = [*side.starts()["python -m"], "serve", "--config", str(side.site / "appliance.toml")]
    log = side.site / "serve.log"
    with log.open("wb") as written:
        process = subprocess.Popen(line, stdout=written, stderr=written, env=side.environment)
    try:
        deadline = time.monotonic() + READY_S
        while "\nready\n" not in "\n" + log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{side.name}: serve did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def measure(sides: list[Checkout], runs: int, appliance: str) -> list[dict]:
    """Return a row for each command and way to start it, its runs interleaved over the checkouts."""
    rows = []
    for name, spellings in COMMANDS.items():
        if appliance == "running" and name.startswith("-"):
            continue
        for way in ("python -m", "console script"):
            lines = {side: words_for(side, side.starts()[way], spellings) for side in sides}
            seconds: dict[str, list[float]] = {side.name: [] for side in sides}
            for _ in range(runs):
                for side, line in lines.items():
                    seconds[side.name].append(processor_seconds(line, side.environment)[0])
            median = {side: round(statistics.median(values), 3) for side, values in seconds.items()}
            spread = {side: [round(min(values), 3), round(max(values), 3)] for side, values in seconds.items()}
            rows.append({"command": name, "start": way, "appliance": appliance, "median_s": median, "range_s": spread})
            print(rows[-1], file=sys.stderr)
    return rows


def table(rows: list[dict], names: list[str]) -> str:
    """Return the rows as a Markdown table: median and range of the processor seconds."""
    lines = [f"| command | start | appliance | {' | '.join(f'{name} (s)' for name in names)} | limit (s) |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for row in rows:
        figures = [
            f"{row['median_s'][name]:.2f} ({row['range_s'][name][0]:.2f} to {row['range_s'][name][1]:.2f})"
            for name in names
        ]
        limit = LIMIT_S.get(row["command"], OTHER_S)
        lines.append(f"| `{row['command']}` | {row['start']} | {row['appliance']} | {' | '.join(figures)} | {limit} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print the table and write the result; return 1 when a median is above its limit."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=9)
    options.add_argument("--beside", metavar="CHECKOUT_OR_PYTHON", help="another checkout, or the interpreter of one")
    options.add_argument("--site", type=Path, default=ROOT / "tests" / "sites" / "0.1.0")
    options.add_argument("--out", type=Path, default=RESULT)
    chosen = options.parse_args()
    site, out = chosen.site.resolve(), chosen.out.resolve()
    beside = Path(chosen.beside).absolute() if chosen.beside else None
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # `python -m` prefers the packages of the current folder
        sides = [checkout("this", ROOT, site, Path(scratch))]
        if beside:
            sides.append(checkout("beside", beside, site, Path(scratch)))
        versions = {
            side.name: subprocess.check_output(
                [*side.starts()["python -m"], "--version"], env=side.environment, text=True
            )
            .strip()
            .removeprefix("cxrloop ")
            for side in sides
        }
        rows = measure(sides, chosen.runs, "stopped")
        with contextlib.ExitStack() as running:
            for side in sides:
                running.enter_context(serving(side))
            rows += measure(sides, chosen.runs, "running")
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
    result = {"machine": machine, "runs": chosen.runs, "versions": versions, "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(table(rows, [side.name for side in sides]))
    slow = [row for row in rows if row["median_s"]["this"] > LIMIT_S.get(row["command"], OTHER_S)]
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
