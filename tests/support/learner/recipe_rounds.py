"""Rounds of the recipes pseudo-label and kd for tests: trained whole or step by step, and checks of their files."""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

from learner.__main__ import main
from learner.engine import distributed
from learner.engine.progress import ProgressWriter
from learner.round.manifest import load
from learner.training.run import Run
from tests.support.learner.processes import start, wait_for
from tests.support.learner.round_folders import card, make_round, result
from tests.support.learner.weights import same_weights

CLASS_LOSS_ONLY = {"prototypes": 0, "local_views": 0, "init": "mimetic"}
CONVNET = "test_resnet"  # a residual network with .4 million weights and batch norm


def whole_rounds(tmp_path_factory, cases):
    """Return a function that trains the first round of a case once and returns its folder."""
    made = {}

    def folder_of(case):
        if case not in made:
            made[case] = make_round(tmp_path_factory.mktemp("whole") / "r", **cases[case])
            assert main([str(made[case])]) == 0
        return made[case]

    return folder_of


EPS = 1e-3  # of Adam: much smaller than the gradients of these rounds (.1), much larger than their rounding (1e-6)


class PhasesOnly(Run):
    """A run without exports and with a larger eps of Adam, to compare runs that sum in another order.

    Adam divides a gradient by its own size: where the true gradient is zero, rounding would make a full step.
    """

    def export(self, name, state, serve, chosen=None, plan=None):
        pass

    def new_state(self, *arguments, **keywords):
        state = super().new_state(*arguments, **keywords)
        for group in state.optimiser.param_groups:
            group["eps"] = EPS
        return state


def phases_of(folder):
    """Train all phases of a round folder's recipe."""
    manifest = load(folder)
    run = PhasesOnly(manifest)
    try:
        importlib.import_module(f"learner.recipes.{manifest.recipe.method.replace('-', '_')}").train(run)
    finally:
        run.progress.close()


def rows_of(folder):
    """Return the rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def opened(folder, **overrides):
    """Return a run on a new round."""
    make_round(folder, **overrides)
    return Run(load(folder))


def without_label(run):
    return [sample for sample in run.manifest.unlabelled if not sample.labelled]


def check_phases(folder, phases):
    """Check the number of steps of each phase, and that the round exported two models."""
    steps = [row["phase"] for row in rows_of(folder) if "kind" not in row]
    assert {phase: steps.count(phase) for phase in steps} == phases
    assert sorted(path.name for path in (folder / "final").iterdir()) == sorted(
        path.name for path in (folder / "t0").iterdir()
    )
    assert card(folder, "t0")["phase"] == "t0"
    assert card(folder)["phase"] == list(phases)[-1]


def check_stopping_after_every_step(reference, folder, steps, monkeypatch):
    """Check that a round that pauses after every step equals an uninterrupted one bit for bit, on the CPU."""
    starts, step = 0, ProgressWriter.write_step

    def step_and_pause(progress, state, losses):
        step(progress, state, losses)
        progress.signal_name = "one step"

    monkeypatch.setattr(ProgressWriter, "write_step", step_and_pause)
    while (code := main([str(folder)])) == 75:
        starts += 1
        assert result(folder)["reason"] == "one step"  # and not a signal from outside
    assert code == 0
    assert starts == steps
    for model in ("t0", "final"):
        assert same_weights(reference / model / "state.safetensors", folder / model / "state.safetensors")
    untimed = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(f)] for f in (reference, folder)]
    assert untimed[0] == untimed[1]


def check_killed_and_restarted(reference, folder):
    """Check that a round killed while the student trains, and restarted, equals an uninterrupted one."""
    process = start(folder)
    wait_for(folder / "t0/state.safetensors", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "final").exists()
    assert main([str(folder)]) == 0
    assert same_weights(reference / "final/state.safetensors", folder / "final/state.safetensors")
    assert len(rows_of(folder)) == len(rows_of(reference))


if __name__ == "__main__":  # under torchrun: the phases of several rounds, one after the other
    with distributed.process_group():
        for name in sys.argv[1:]:
            phases_of(Path(name))
