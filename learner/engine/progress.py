"""Progress of a round: progress.json for the agent, metrics.jsonl for the figure, bars or lines on stderr.

Also decides when to pause: after a signal to any rank, or at the end of the window. Only rank 0 writes.
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
from collections.abc import Callable, Mapping
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

STEP_GRACE_S = 10  # longest wait for the current step after SIGTERM; then the round keeps its last periodic checkpoint
DEADLINE_S = 18  # from SIGTERM to the exit, with or without a new checkpoint; the agent waits longer than this
PROGRESS_EVERY_S = 1.0  # between two writes of progress.json
LINE_EVERY_S = 10.0  # between two lines on stderr when it is no terminal
DIGITS = 6  # significant digits of a number in metrics.jsonl


class ProgressWriter:
    """Writes the progress of one process on one round, and handles its signals."""

    def __init__(self, folder: Path, until: datetime | None, spent: float, metrics_bytes: int) -> None:
        """`until`: end of the window; `spent`: seconds of earlier processes; `metrics_bytes`: length at the checkpoint."""
        self.folder, self.until, self.spent = folder, until, spent
        self.started = time.monotonic()
        self.signal_name: str | None = None
        self.pausing, self.saved = threading.Event(), threading.Event()  # set when a pause begins; when it is saved
        self.old_handlers: dict[int, Any] = {}
        self.phase_start: tuple[str, int, float] | None = None
        self.last_progress = self.last_line = -math.inf
        self.metrics = (folder / "metrics.jsonl" if distributed.is_rank_zero() else Path(os.devnull)).open("ab")
        if distributed.is_rank_zero():
            self.metrics.truncate(metrics_bytes)  # the steps after the checkpoint run again
        console = Console(stderr=True)
        self.bars = Progress(*COLUMNS, console=console) if console.is_terminal and distributed.is_rank_zero() else None
        if self.bars:
            self.bars.start()

    @property
    def seconds(self) -> float:
        """Seconds spent on this round, earlier processes included."""
        return self.spent + time.monotonic() - self.started

    def handle_signals(self) -> None:
        """Pause on SIGTERM and SIGINT; exit without saving where a step takes longer than STEP_GRACE_S.

        A thread reads the interpreter's wake-up socket, because the main thread may be a minute inside one call of torch
        (a backward pass), and Python runs no signal handler before that call returns.
        """
        self.wake_receiver, wake = socket.socketpair()
        wake.setblocking(False)
        self.wake = wake
        self.old_handlers = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        signal.set_wakeup_fd(wake.fileno())
        threading.Thread(target=self._enforce_deadline, name="deadline", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.old_handlers)  # blocked while the process imported

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    def _enforce_deadline(self) -> None:
        """Wait in a thread for the first signal, then end the process when it takes too long."""
        number = self.wake_receiver.recv(1)
        if not number:  # `close` closed the socket: no signal came
            return
        self.signal_name = signal.Signals(number[0]).name
        if not self.pausing.wait(STEP_GRACE_S):
            self._exit_unsaved("within a step")
        if not self.saved.wait(DEADLINE_S - STEP_GRACE_S):
            self._exit_unsaved("while saving")

    def _exit_unsaved(self, where: str) -> None:
        result = {"state": "paused", "reason": f"{self.signal_name}, {where}: back to the last checkpoint"}
        if distributed.is_rank_zero():
            write_result(self.folder, result | {"seconds": round(self.seconds, 1)})
        if self.bars:
            self.bars.stop()
        os._exit(0 if distributed.under_torchrun() else PAUSED)

    def raise_if_paused(self) -> None:
        """Raise Paused after a signal to any rank or at the end of the window; on all ranks after the same step."""
        mine = self.signal_name
        if not mine and self.until and datetime.now(UTC) >= self.until:
            mine = f"the window ended at {self.until.isoformat()}"
        reason = next((reason for reason in distributed.gather_values(mine) if reason), None)
        if reason:
            self.pausing.set()
            raise Paused(reason)

    def write_step(self, state: State, losses: Mapping[str, float]) -> None:
        """Write one finished optimiser step; `losses` holds numbers by name and must have "loss"."""
        steps, rate = state.schedule.steps, state.optimiser.param_groups[0]["lr"]
        self._write(
            {"phase": state.phase, "step": state.step, "steps": steps, "burst": state.burst, "lr": rate}, losses
        )
        now = time.monotonic()
        if not self.phase_start or self.phase_start[0] != state.phase:
            self.phase_start = (state.phase, state.step, now)
        if now - self.last_progress >= PROGRESS_EVERY_S:
            self.last_progress = now
            self.write_progress(state.phase, state.step, steps, losses["loss"], self._eta(state, now))

    def write_note(self, state: State, kind: str, numbers: Mapping[str, float | None]) -> None:
        """Write a note between steps to metrics.jsonl, such as "pseudo": the share of pseudo-labels."""
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
        """Write progress.json, and a bar or a line on stderr; `eta` in seconds."""
        if not distributed.is_rank_zero():
            return
        left = eta if eta is None else round(eta, 1)
        progress = {"phase": phase, "step": step, "steps": steps, "loss": loss, "eta_s": left}
        write_json(self.folder / "progress.json", progress | {"at": datetime.now(UTC).isoformat(timespec="seconds")})
        details = [f"loss {loss:.3f}"] if loss is not None else []
        details += [f"{timedelta(seconds=round(eta))} left"] if eta is not None else []
        if self.bars:
            self._update_bars(phase, step, steps, details)
        elif loss is None:  # an export, or the end of the round
            sys.stderr.write(f"{phase}\n" if step < steps or phase == "done" else "")
        elif time.monotonic() - self.last_line >= LINE_EVERY_S:
            self.last_line = time.monotonic()
            sys.stderr.write(f"{phase}: step {step} of {steps}, {', '.join(details)}\n")

    def reporter(self, phase: str) -> Callable[[int, int], None]:
        """Return a function that writes the progress of long work between two steps, and raises Paused when it is due."""

        def report(done: int, of: int) -> None:
            self.write_progress(phase, done, of)
            self.raise_if_paused()

        return report

    def _update_bars(self, phase: str, step: int, steps: int, details: list[str]) -> None:
        """Show one bar for each phase; the bars of finished phases stay, with their duration."""
        assert self.bars
        mine = next((task.id for task in self.bars.tasks if task.description == phase), None)
        if mine is None and phase != "done":
            mine = self.bars.add_task(phase, total=steps, words="", count="")
        for task in self.bars.tasks:
            if task.id == mine:
                count = f"{step}/{steps}" if steps > 1 else ""
                self.bars.update(task.id, completed=step, total=steps, count=count, words=", ".join(details))
            finished = task.id != mine or step == steps == 1
            if finished and not task.fields["words"].startswith("took"):
                took = timedelta(seconds=round(task.elapsed or 0))
                count = f"{task.total:.0f}/{task.total:.0f}" if task.total != 1 else ""
                self.bars.update(task.id, completed=task.total, count=count, words=f"took {took}")

    def flush(self) -> int:
        """Write metrics.jsonl to disk; return its length in bytes."""
        self.metrics.flush()
        os.fsync(self.metrics.fileno())
        return self.metrics.tell()

    def close(self) -> None:
        """Restore the signal handlers and close metrics.jsonl and the bars."""
        self.pausing.set()
        self.saved.set()
        if self.old_handlers:
            signal.set_wakeup_fd(-1)
            self.wake.close()  # ends the thread
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError):  # full disk: the steps after the checkpoint run again
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
