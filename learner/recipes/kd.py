"""`kd`: knowledge distillation between two networks, after Ho & Gwak (IEEE Access 2020), for multi-label findings.

Strategies: "base" trains on labels only; "standard" trains `kd_teacher` on labels, then the student on both; "reversed"
exchanges the networks, so that `kd_teacher` is the student and is served; "defective" stops the teacher after a quarter of
its epochs; in "self" the teacher is a trained copy of the student's network. Unlabelled images have the teacher's loss only.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from learner.engine.optim import Schedule
from learner.engine.step import Batch, Losses, Objective, State, Terms, in_float32, optimiser_step, share_of
from learner.errors import LearnerError, ManifestError
from learner.networks.architecture import Plan
from learner.networks.backbone import Backbone, build
from learner.networks.heads import Network
from learner.objectives.class_losses import Balance
from learner.objectives.dino import autocast
from learner.objectives.distl_steps import Feed, next_batch, supervised_step
from learner.objectives.knowledge_distillation import kd_loss
from learner.pretrained.reader import open_backbone
from learner.round.backbone_file import is_file_name
from learner.round.recipe import Recipe
from learner.training.run import Run
from learner.training.supervised import label_balance, train_on_labels

DEFECTIVE = 4  # a defective teacher stops after 1/4 of its epochs, as published (50 of 200)


def train(run: Run) -> None:
    """Train T=0 if there is no parent, the teacher and the student. A parent is the student, in "self" the teacher."""
    recipe, strategy = run.recipe, run.recipe.kd_strategy
    if not run.manifest.labelled:
        raise ManifestError(
            "manifest: no labelled train image: kd needs labels; label some, or use recipe distl with a parent"
        )
    labelled, balance = run.labelled_feed("t0"), label_balance(run)
    label_schedule = run.schedule(labelled, recipe.t0_epochs, recipe.t0_lr, recipe.t0_steps)

    def label_step(state: State) -> Losses:
        return supervised_step(state, labelled, balance)

    plan, weights = teacher_plan(recipe) if strategy not in ("base", "self") else (run.plan, None)
    if strategy == "reversed" and not run.is_first_round:
        raise ManifestError('kd_strategy = "reversed" cannot have a parent; use "standard" in later rounds')
    t0 = train_on_labels(run, run.from_backbone) if run.is_first_round else None
    if strategy == "base":
        final = t0 or run.train_phase("kd", label_schedule, run.from_parent, label_step)
        return run.export("final", final, "student")

    start, student_plan = run.from_backbone if run.is_first_round else run.from_parent, run.plan
    if strategy == "reversed" or strategy == "self":
        teacher = t0.student if t0 else run.champion()
        start, student_plan = (
            (run.from_weights(weights), plan) if strategy == "reversed" else (run.from_backbone, run.plan)
        )
    else:
        schedule = first_quarter(label_schedule) if strategy == "defective" else label_schedule
        teacher = run.train_phase("teacher", schedule, run.from_weights(weights), label_step, plan).student
    teacher.to(run.device).eval().requires_grad_(False)

    rest = [sample for sample in run.manifest.unlabelled if not sample.labelled]
    feeds = [labelled, run.feed(rest, "unlabelled", 0, False)] if rest and recipe.kd_alpha else [labelled]
    schedule = run.schedule(labelled, recipe.epochs, recipe.lr, recipe.t0_steps)
    final = run.train_phase("kd", schedule, start, lambda state: kd_step(state, teacher, feeds, balance), student_plan)
    final.teacher.load_state_dict(final.student.state_dict())
    run.export("final", final, "student", plan=student_plan)


def teacher_plan(recipe: Recipe) -> tuple[Plan, dict[str, Tensor] | None]:
    """Return plan and weights of `kd_teacher`: those of a file, or None for a name. Raises LearnerError.

    The network must accept the round's image size, and no blocks may be frozen.
    """
    name = recipe.kd_teacher
    keys = {"backbone": name} if is_file_name(name) else {"backbone": "random", "arch": name}
    opened = open_backbone(replace(recipe, **keys, backbone_sha256=""))
    plan, weights = opened.plan, opened.tensors
    network = build(plan)
    if recipe.frozen_blocks:
        raise LearnerError("frozen_blocks: kd_teacher cannot use cached tokens; set frozen_blocks = 0")
    if isinstance(network, Backbone) and recipe.image_size % network.patch:
        raise LearnerError(
            f'kd_teacher = "{name}": image_size {recipe.image_size} is no multiple of its patch {network.patch}'
        )
    return plan, weights


def first_quarter(schedule: Schedule) -> Schedule:
    """Return the schedule cut after its first quarter of epochs, at least one; rates unchanged."""
    steps = max(1, len(schedule.alpha) // DEFECTIVE) * schedule.steps_per_epoch
    return replace(schedule, lr=schedule.lr[:steps])


def kd_step(state: State, teacher: Network, feeds: Sequence[Feed], balance: Balance | None = None) -> Losses:
    """Make one step on a batch of each feed with the distillation loss."""
    batches = [next_batch(feed, state.step) for feed in feeds]
    samples = sum(batch.whole for batch in batches)
    losses = optimiser_step(
        state, [(batch, kd_objective(teacher, batch.whole / samples, balance or {})) for batch in batches]
    )
    state.step += 1
    return losses


def kd_objective(teacher: Network, share: float, balance: Balance) -> Objective:
    """Return the objective (1 - alpha) L_label + alpha T^2 KL(teacher || student) on the augmented view.

    share: this batch's share of the images of the step. Unlabelled images have no first term.
    """

    def objective(state: State, batch: Batch, part: slice) -> Terms:
        assert batch.labels is not None
        recipe, view = state.recipe, batch.views(part)[1]
        with autocast(state, view):
            with torch.no_grad():
                teacher_logits = in_float32(teacher.classify(view))
            logits = in_float32(state.student.classify(view))
        loss, label_term, kl_term = kd_loss(
            logits, teacher_logits, batch.labels[part], recipe.kd_alpha, recipe.kd_temperature, batch.known,
            share * share_of(batch, part), **balance,
        )  # fmt: skip
        return Terms(loss, {"classes": label_term, "taught": kl_term})

    return objective
