"""What a round says while it runs: progress.json for the agent, metrics.jsonl for curves, a bar or lines for people.

Also decides when to stop: a signal or the end of the window. Knows no tensor. Time comes in as two clocks.
"""

import json
import math
import os
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from learner.distill import Losses, State
from learner.round_dir import PAUSED, write_json

GRACE = 10  # seconds a step may still take after SIGTERM; then the last periodic checkpoint has to do
EVERY = 1.0  # seconds between two progress.json
LINE_EVERY = 10.0  # seconds between two plain lines when no one sits at a terminal


class Paused(Exception):
    """The round must yield; its state is consistent and unsaved. The text is the reason."""


class Teller:
    """Progress of one process on one round."""

    def __init__(self, folder: Path, until: datetime | None, spent: float, metrics_bytes: int) -> None:
        self.folder, self.until, self.spent = folder, until, spent
        self.started = time.monotonic()
        self.asked: str | None = None
        self.before: dict[int, Any] = {}
        self.phase_start: tuple[str, int, float] | None = None
        self.told = self.lined = -math.inf
        self.metrics = (folder / "metrics.jsonl").open("ab")
        self.metrics.truncate(metrics_bytes)  # lines after the checkpoint are written again
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        self.bar = (
            Progress(*columns, TextColumn("{task.fields[note]}"), console=console) if console.is_terminal else None
        )
        self.task = self.bar.add_task("", total=None, note="") if self.bar else None
        if self.bar:
            self.bar.start()

    @property
    def seconds(self) -> float:
        """Spent on this round by all its processes."""
        return self.spent + time.monotonic() - self.started

    def listen(self) -> None:
        """SIGTERM and Ctrl-C ask for a pause; a step that takes longer than GRACE is given up."""
        asks = {signal.SIGTERM: self._ask, signal.SIGINT: self._ask, signal.SIGALRM: self._give_up}
        self.before = {number: signal.signal(number, handler) for number, handler in asks.items()}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        signal.alarm(GRACE)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        result = {"state": "paused", "reason": f"{self.asked}, within a step: back to the last checkpoint"}
        write_json(self.folder / "result.json", result | {"seconds": round(self.seconds, 1)})
        os._exit(PAUSED)

    def check(self) -> None:
        """Raise Paused when asked to, or when the window is over."""
        if self.asked:
            raise Paused(self.asked)
        if self.until and datetime.now(UTC) >= self.until:
            raise Paused(f"the window ended at {self.until.isoformat()}")

    def step(self, state: State, losses: Losses) -> None:
        """One optimiser step is done."""
        row = {"phase": state.phase, "step": state.step, "burst": state.burst, "seconds": round(self.seconds, 3)}
        row |= {key: round(value, 6) if math.isfinite(value) else None for key, value in losses.items()}
        self.metrics.write((json.dumps(row) + "\n").encode())
        now = time.monotonic()
        if not self.phase_start or self.phase_start[0] != state.phase:
            self.phase_start = (state.phase, state.step, now)
        if now - self.told >= EVERY:
            self.told = now
            self.say(state.phase, state.step, state.schedule.steps, losses["loss"], self._eta(state, now))

    def _eta(self, state: State, now: float) -> float | None:
        assert self.phase_start
        done = state.step - self.phase_start[1]
        return (now - self.phase_start[2]) / done * (state.schedule.steps - state.step) if done > 0 else None

    def say(self, phase: str, step: int, steps: int, loss: float | None = None, eta: float | None = None) -> None:
        """progress.json, and the bar or a line."""
        progress = {
            "phase": phase,
            "step": step,
            "steps": steps,
            "loss": loss,
            "eta_s": eta if eta is None else round(eta, 1),
        }
        write_json(self.folder / "progress.json", progress | {"at": datetime.now(UTC).isoformat(timespec="seconds")})
        note = "" if loss is None else f"loss {loss:.3f}"
        if self.bar and self.task is not None:
            self.bar.update(self.task, description=phase, completed=step, total=steps, note=note)
        elif time.monotonic() - self.lined >= LINE_EVERY or loss is None:
            self.lined = time.monotonic()
            left = "" if eta is None else f", {eta:.0f} s left"
            sys.stderr.write(f"{phase}: step {step} of {steps} {note}{left}\n")

    def flush(self) -> int:
        """Bytes of metrics.jsonl so far, all on disk."""
        self.metrics.flush()
        os.fsync(self.metrics.fileno())
        return self.metrics.tell()

    def close(self) -> None:
        signal.alarm(0)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.metrics.close()
        if self.bar:
            self.bar.stop()
