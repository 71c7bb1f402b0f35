"""`python -m learner ROUND_DIR`: one round from manifest to bundle parts, top to bottom, resumable at any step.

With no parent: T=0 on the labels (`t0/` at once), then DISTL on every train film (`final/`). With a parent: DISTL only.
Exit 0 trained, 75 paused, 3 stopped with a reason in result.json. Golden films, the ledger and DICOM are unknown here.
"""

import argparse
import os
import sys
import time
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from learner.backbone import BackboneError, Plan, fit_sizes, open_backbone
from learner.checkpoint import CheckpointError, load_network, load_state, read_file, save_state
from learner.correct import walk
from learner.data import Films
from learner.distill import DinoLoss, Losses, State, Stopped
from learner.export import write_parts
from learner.heads import make_network
from learner.mimetic import mimic_trained
from learner.optim import Schedule, make_optimiser, make_schedule
from learner.progress import Paused, Teller
from learner.recipe import Recipe
from learner.round_dir import PAUSED, STOPPED, TRAINED, ManifestError, Round, RoundBusy, held, load, write_json

REFUSALS = (ManifestError, BackboneError, CheckpointError, Stopped)  # known reasons; anything else is a crash


def main(arguments: list[str] | None = None) -> int:
    """Run or resume the round in a folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m learner", description="Train one round; start again to resume.")
    parser.add_argument("round_dir", type=Path, help="folder with manifest.json")
    folder: Path = parser.parse_args(arguments).round_dir
    try:
        with held(folder):
            return run(folder)
    except (RoundBusy, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1


def run(folder: Path) -> int:
    """The round, under its lock."""
    result = {"state": "trained", "reason": None, "seconds": 0.0, "unlabelled": 0, "labelled": 0}
    code, teller = TRAINED, None
    try:
        round_ = load(folder)
        result |= {"unlabelled": len(round_.unlabelled), "labelled": len(round_.labelled)}
        (folder / "checkpoint").mkdir(exist_ok=True)
        device, dtype = prepare(round_.recipe)
        state, plan, spent, metrics_bytes = begin(round_, device, dtype)
        teller = Teller(folder, round_.until, spent, metrics_bytes)
        teller.listen()
        train(round_, state, plan, device, teller)
    except Paused as pause:
        code, result["state"], result["reason"] = PAUSED, "paused", str(pause)
    except REFUSALS as error:
        code, result["state"], result["reason"] = STOPPED, "stopped", str(error)
    finally:
        if teller:
            result["seconds"] = round(teller.seconds, 1)
            teller.close()
    write_json(folder / "result.json", result)
    if result["reason"]:
        print(f"{result['state']}: {result['reason']}", file=sys.stderr)
    return code


def prepare(recipe: Recipe) -> tuple[torch.device, torch.dtype | None]:
    """Threads, determinism, the device, and the type of autocast (None on the CPU)."""
    torch.set_num_threads(recipe.threads or os.cpu_count() or 1)
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise Stopped('device = "cuda": torch sees no GPU here; check the driver or set device = "auto"')
    if recipe.device == "cpu" or not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)  # bitwise resume is promised on the CPU only
        return torch.device("cpu"), None
    torch.set_float32_matmul_precision("high")
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.device("cuda"), half if recipe.precision == "auto" else None


def begin(round_: Round, device: torch.device, dtype: torch.dtype | None) -> tuple[State, Plan, float, int]:
    """The state to go on from: the checkpoint, else the parent, else a backbone; with seconds spent and metrics kept."""
    saved = round_.folder / "checkpoint" / "state.safetensors"
    if saved.exists():
        _, header = read_file(saved)
        if header["fingerprint"] != round_.fingerprint:
            raise CheckpointError(f"{saved} belongs to another manifest; remove it, or plan a new round")
        plan, recipe = header["plan"], Recipe.from_dict(header["recipe"])
        state = make_state(round_, plan, recipe, header["cursor"]["phase"], device, dtype)
        load_state(saved, state)
        return state, plan, header["seconds"], header["metrics_bytes"]
    if round_.parent_state:
        tensors, header = read_file(round_.parent_state)
        if header.get("findings") != list(round_.findings):
            raise CheckpointError(
                f"parent {round_.parent} knows {header.get('findings')}, this round {list(round_.findings)}"
            )
        plan = header["plan"]
        state = make_state(round_, plan, round_.recipe, "distil", device, dtype)
        load_network(state.student, tensors, "student.")
        load_network(state.teacher, tensors, "teacher.")
        return state, plan, 0.0, 0
    if not round_.labelled:
        raise ManifestError("manifest: no labelled train film and no parent: a first round needs labels")
    plan, weights = open_backbone(round_.recipe)
    state = make_state(round_, plan, round_.recipe, "t0", device, dtype)
    if weights:
        state.student.backbone.load(weights)
    elif round_.recipe.init == "mimetic":
        mimic_trained(state.student.backbone)
        for layer in state.student.cls_head.mlp:
            if isinstance(layer, torch.nn.Linear):
                layer.reset_parameters()  # DINO's .02 start keeps a three-layer head asleep for hundreds of steps
    return state, plan, 0.0, 0


def make_state(
    round_: Round, plan: Plan, recipe: Recipe, phase: str, device: torch.device, dtype: torch.dtype | None
) -> State:
    """Fresh networks, optimiser and schedule of a phase; random weights from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    student = make_network(plan, recipe, len(round_.findings), recipe.drop_path).to(device)
    teacher = make_network(plan, recipe, len(round_.findings)).to(device).requires_grad_(False)
    recipe = fit_sizes(recipe, student.backbone.patch)
    dino = DinoLoss(recipe.prototypes, recipe.student_temp, recipe.teacher_temp, recipe.centre_momentum).to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    films = round_.labelled if phase == "t0" else round_.unlabelled
    schedule = phase_schedule(recipe, phase, len(films))
    state = State(student, teacher, dino, make_optimiser(student), schedule, recipe, scaler, dtype, phase)
    state.micro = recipe.micro_batch
    return state


def phase_schedule(recipe: Recipe, phase: str, films: int) -> Schedule:
    """Labelled batches keep every film, unlabelled ones drop the short last one."""
    batch = min(recipe.batch, films)
    if phase == "t0":
        steps = -(-films // recipe.batch)
        return make_schedule(recipe, max(recipe.t0_epochs, -(-recipe.t0_steps // steps)), steps, recipe.t0_lr, batch)
    return make_schedule(recipe, recipe.epochs, films // batch, recipe.lr, batch)


def train(round_: Round, state: State, plan: Plan, device: torch.device, teller: Teller) -> None:
    """From the given state to `final/`."""
    one_view = replace(state.recipe, local_views=0)  # a label loss looks at the noised global view only
    if state.phase == "t0":
        labelled = Films(round_.labelled, one_view, device, "t0", fixed_order=False)
        follow(round_, state, plan, teller, None, labelled)
        # The teacher of T=0 is discarded: whoever goes on from t0/, now or in a later round, starts both from the student.
        state.teacher.load_state_dict(state.student.state_dict())
        finish(round_, state, plan, teller, "t0", "student")
        state = after_t0(round_, state, plan, device)
    elif round_.parent is None and not (round_.folder / "t0").exists():
        raise CheckpointError("t0/ is gone although its phase is over; remove checkpoint/ to train it again")
    unlabelled = Films(round_.unlabelled, state.recipe, device, "unlabelled", fixed_order=False)
    views = state.recipe if state.recipe.correct_loss == "mix" else one_view
    labelled = Films(round_.labelled, views, device, "labelled", fixed_order=True) if round_.labelled else None
    follow(round_, state, plan, teller, unlabelled, labelled)
    finish(round_, state, plan, teller, "final", state.recipe.serve)
    teller.say("done", state.step, state.schedule.steps)


def follow(
    round_: Round, state: State, plan: Plan, teller: Teller, unlabelled: Films | None, labelled: Films | None
) -> None:
    """Walk to the end of the phase, telling every step, saving at intervals and before a pause."""
    saved_at = time.monotonic()

    def after(losses: Losses) -> None:
        nonlocal saved_at
        teller.step(state, losses)
        teller.check()
        if time.monotonic() - saved_at >= state.recipe.checkpoint_seconds:
            keep(round_, state, plan, teller)
            saved_at = time.monotonic()

    try:
        teller.check()
        walk(state, unlabelled, labelled, after)
    except Paused:  # raised between two steps only: the state is whole
        keep(round_, state, plan, teller)
        raise
    keep(round_, state, plan, teller)


def keep(round_: Round, state: State, plan: Plan, teller: Teller) -> None:
    """Write the checkpoint."""
    header = {"plan": plan, "recipe": state.recipe.to_dict(), "fingerprint": round_.fingerprint}
    header |= {"metrics_bytes": teller.flush(), "seconds": teller.seconds}
    save_state(round_.folder / "checkpoint" / "state.safetensors", state, header)


def finish(round_: Round, state: State, plan: Plan, teller: Teller, name: str, serve: str) -> None:
    """Export the phase's result as a folder, unless an earlier process did."""
    if not (round_.folder / name).exists():
        teller.say(f"export {name}", 0, 1)
        write_parts(round_.folder / name, state, plan, round_, datetime.now(UTC), serve)
        teller.say(f"export {name}", 1, 1)


def after_t0(round_: Round, trained: State, plan: Plan, device: torch.device) -> State:
    """T=1 begins: teacher := student := the T=0 student; optimiser, schedules and centre start anew."""
    state = make_state(round_, plan, trained.recipe, "distil", device, trained.dtype)
    state.student.load_state_dict(trained.student.state_dict())
    state.teacher.load_state_dict(trained.student.state_dict())
    state.micro, state.notes = trained.micro, trained.notes
    return state


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    sys.exit(main())
