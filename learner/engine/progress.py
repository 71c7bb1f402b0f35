"""What a round says while it runs: progress.json for the agent, metrics.jsonl for curves, bars or lines for people.

Also decides when to stop: a signal to any rank, or the end of the window; rank 0 alone writes and shows. Knows no
tensor. Time comes in as two clocks.
"""

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from cxrloop.durable import write_json
from learner.engine import distributed
from learner.engine.step import State
from learner.errors import Paused
from learner.round.folder import PAUSED, write_result

STEP_GRACE_S = 10  # seconds a step may still take after SIGTERM; then the last periodic checkpoint has to do
DEADLINE_S = 18  # seconds from SIGTERM to the end, checkpoint written or not; the agent was told 20
EVERY = 1.0  # seconds between two progress.json
LINE_EVERY = 10.0  # seconds between two plain lines when no one sits at a terminal
DIGITS = 6  # significant, of a number in metrics.jsonl: a learning rate of 1e-6 keeps them too


class ProgressWriter:
    """Progress of one process on one round."""

    def __init__(self, folder: Path, until: datetime | None, spent: float, metrics_bytes: int) -> None:
        self.folder, self.until, self.spent = folder, until, spent
        self.started = time.monotonic()
        self.signal_name: str | None = None
        self.leaving, self.left = threading.Event(), threading.Event()  # a pause is being saved; it is over
        self.before: dict[int, Any] = {}
        self.phase_start: tuple[str, int, float] | None = None
        self.last_progress = self.last_line = -math.inf
        self.metrics = (folder / "metrics.jsonl" if distributed.is_rank_zero() else Path(os.devnull)).open("ab")
        if distributed.is_rank_zero():
            self.metrics.truncate(metrics_bytes)  # lines after the checkpoint are written again
        console = Console(stderr=True)
        self.bars = Progress(*COLUMNS, console=console) if console.is_terminal and distributed.is_rank_zero() else None
        if self.bars:
            self.bars.start()

    @property
    def seconds(self) -> float:
        """Spent on this round by all its processes."""
        return self.spent + time.monotonic() - self.started

    def handle_signals(self) -> None:
        """SIGTERM and Ctrl-C ask for a pause; a step that takes longer than STEP_GRACE_S is given up.

        A thread waits for them on the interpreter's wake-up socket: the main thread may sit for a minute in a single
        call of the library (one backward pass), and no Python handler runs before that call returns.
        """
        self.bell, wake = socket.socketpair()
        wake.setblocking(False)
        self.wake = wake
        self.before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.set_wakeup_fd(wake.fileno())
        threading.Thread(target=self._enforce_deadline, name="deadline", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.before)  # blocked while the process imported

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def _enforce_deadline(self) -> None:
        """In its own thread: from the first signal on, see that this process leaves in time."""
        number = self.bell.recv(1)
        if not number:  # the progress was closed: no signal came
            return
        self.signal_name = signal.Signals(number[0]).name
        if not self.leaving.wait(STEP_GRACE_S):
            self._exit_unsaved("within a step")
        if not self.left.wait(DEADLINE_S - STEP_GRACE_S):
            self._exit_unsaved("while saving")

    def _exit_unsaved(self, where: str) -> None:
        result = {"state": "paused", "reason": f"{self.signal_name}, {where}: back to the last checkpoint"}
        if distributed.is_rank_zero():
            write_result(self.folder, result | {"seconds": round(self.seconds, 1)})
        if self.bars:
            self.bars.stop()
        os._exit(0 if distributed.under_torchrun() else PAUSED)

    def raise_if_paused(self) -> None:
        """Raise Paused when a rank is asked to, or when the window is over: on all ranks, after the same step."""
        mine = self.signal_name
        if not mine and self.until and datetime.now(UTC) >= self.until:
            mine = f"the window ended at {self.until.isoformat()}"
        reason = next((given for given in distributed.gather_values(mine) if given), None)
        if reason:
            self.leaving.set()
            raise Paused(reason)

    def write_step(self, state: State, losses: Mapping[str, float]) -> None:
        """One optimiser step is done; `losses` may hold any numbers by name, "loss" among them."""
        steps, rate = state.schedule.steps, state.optimiser.param_groups[0]["lr"]
        self._write(
            {"phase": state.phase, "step": state.step, "steps": steps, "burst": state.burst, "lr": rate}, losses
        )
        now = time.monotonic()
        if not self.phase_start or self.phase_start[0] != state.phase:
            self.phase_start = (state.phase, state.step, now)
        if now - self.last_progress >= EVERY:
            self.last_progress = now
            self.write_progress(state.phase, state.step, steps, losses["loss"], self._eta(state, now))

    def write_note(self, state: State, kind: str, numbers: Mapping[str, float | None]) -> None:
        """A row of metrics.jsonl that is no step, such as "pseudo": how many pseudo-labels there are, and how good."""
        self._write({"kind": kind, "phase": state.phase, "step": state.step}, numbers)

    def _write(self, place: dict[str, Any], numbers: Mapping[str, float | None]) -> None:
        row = place | {"seconds": round(self.seconds, 3)} | {key: _short(value) for key, value in numbers.items()}
        self.metrics.write((json.dumps(row) + "\n").encode())

    def _eta(self, state: State, now: float) -> float | None:
        assert self.phase_start
        done = state.step - self.phase_start[1]
        return (now - self.phase_start[2]) / done * (state.schedule.steps - state.step) if done > 0 else None

    def write_progress(
        self, phase: str, step: int, steps: int, loss: float | None = None, eta: float | None = None
    ) -> None:
        """progress.json, and a bar or a line."""
        if not distributed.is_rank_zero():
            return
        left = eta if eta is None else round(eta, 1)
        progress = {"phase": phase, "step": step, "steps": steps, "loss": loss, "eta_s": left}
        write_json(self.folder / "progress.json", progress | {"at": datetime.now(UTC).isoformat(timespec="seconds")})
        words = [f"loss {loss:.3f}"] if loss is not None else []
        words += [f"{timedelta(seconds=round(eta))} left"] if eta is not None else []
        if self.bars:
            self._show(phase, step, steps, words)
        elif loss is None:  # no training step: an export, or the end
            sys.stderr.write(f"{phase}\n" if step < steps or phase == "done" else "")
        elif time.monotonic() - self.last_line >= LINE_EVERY:
            self.last_line = time.monotonic()
            sys.stderr.write(f"{phase}: step {step} of {steps}, {', '.join(words)}\n")

    def write_progress_or_pause(self, phase: str, done: int, of: int) -> None:
        """`say`, then `check`, in work that is no step: thousands of images take an hour, the window's end doesn't wait."""
        self.write_progress(phase, done, of)
        self.raise_if_paused()

    def _show(self, phase: str, step: int, steps: int, words: list[str]) -> None:
        """One bar a phase; those that are over stay, filled, with what they took."""
        assert self.bars
        mine = next((task.id for task in self.bars.tasks if task.description == phase), None)
        if mine is None and phase != "done":
            mine = self.bars.add_task(phase, total=steps, words="", count="")
        for task in self.bars.tasks:
            if task.id == mine:
                count = f"{step}/{steps}" if steps > 1 else ""
                self.bars.update(task.id, completed=step, total=steps, count=count, words=", ".join(words))
            over = task.id != mine or step == steps == 1
            if over and not task.fields["words"].startswith("took"):
                took = timedelta(seconds=round(task.elapsed or 0))
                count = f"{task.total:.0f}/{task.total:.0f}" if task.total != 1 else ""
                self.bars.update(task.id, completed=task.total, count=count, words=f"took {took}")

    def flush(self) -> int:
        """Bytes of metrics.jsonl so far, all on disk."""
        self.metrics.flush()
        os.fsync(self.metrics.fileno())
        return self.metrics.tell()

    def close(self) -> None:
        """Stop listening and showing; what was written stays."""
        self.leaving.set()
        self.left.set()
        if self.before:
            signal.set_wakeup_fd(-1)
            self.wake.close()  # ends the thread's wait
        for number, handler in self.before.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):  # on a full disk: the lines after the checkpoint are written again
            self.metrics.close()
        if self.bars:
            self.bars.stop()


COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.fields[count]}", justify="right"),
    TextColumn("{task.fields[words]}", style="dim"),
)


def _short(value: float | None) -> float | None:
    return float(f"{value:.{DIGITS}g}") if value is not None and math.isfinite(value) else None
