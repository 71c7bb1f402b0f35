"""`kd`: knowledge distillation between two networks, after Ho & Gwak, with one Bernoulli answer a finding.

Strategies: `base` learns labels alone; in `standard` the network `kd_teacher` learns them first and teaches; in
`reversed` the two change places, so that `kd_teacher` is taught and served; `defective` stops the teacher at a quarter
of its epochs; in `self` a trained copy teaches a student that starts anew. Images without a label bring answers only.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from learner.engine.optim import Schedule
from learner.engine.step import Batch, Losses, Objective, State, Terms, in_float32, optimiser_step, share_of
from learner.errors import LearnerError, ManifestError
from learner.networks.architecture import Plan
from learner.networks.backbone import Backbone, build, open_backbone
from learner.networks.heads import Network
from learner.objectives.class_losses import Balance
from learner.objectives.correction import Feed, next_batch, supervised_step
from learner.objectives.dino import autocast
from learner.objectives.knowledge_distillation import kd_loss
from learner.round.recipe import Recipe
from learner.training.run import Run
from learner.training.supervised import label_balance, train_on_labels

DEFECTIVE = 4  # one in so many epochs: the published 50 of 200


def train(run: Run) -> None:
    """T=0 when there is no parent, the teacher, the student. A parent goes on as the student, in `self` as the teacher."""
    recipe, strategy = run.recipe, run.recipe.kd_strategy
    if not run.manifest.labelled:
        raise ManifestError(
            "manifest: no labelled train image: kd trains on labels; label some, or use recipe distl with a parent"
        )
    labelled, balance = run.labelled_feed("t0"), label_balance(run)
    alone = run.schedule(labelled, recipe.t0_epochs, recipe.t0_lr, recipe.t0_steps)

    def learn(state: State) -> Losses:
        return supervised_step(state, labelled, balance)

    plan, weights = teacher_plan(recipe) if strategy not in ("base", "self") else (run.plan, None)
    if strategy == "reversed" and not run.is_first_round:
        raise ManifestError('kd_strategy = "reversed" changes networks and has no parent; use "standard" from now on')
    t0 = train_on_labels(run, run.from_backbone) if run.is_first_round else None
    if strategy == "base":
        final = t0 or run.train_phase("kd", alone, run.from_parent, learn)
        return run.export("final", final, "student")

    start, own = run.from_backbone if run.is_first_round else run.from_parent, run.plan
    if strategy == "reversed" or strategy == "self":
        teacher = t0.student if t0 else run.champion()
        start, own = (run.from_weights(weights), plan) if strategy == "reversed" else (run.from_backbone, run.plan)
    else:
        length = first_quarter(alone) if strategy == "defective" else alone
        teacher = run.train_phase("teacher", length, run.from_weights(weights), learn, plan).student
    teacher.to(run.device).eval().requires_grad_(False)

    rest = [sample for sample in run.manifest.unlabelled if not sample.labelled]
    feeds = [labelled, run.feed(rest, "unlabelled", 0, False)] if rest and recipe.kd_alpha else [labelled]
    schedule = run.schedule(labelled, recipe.epochs, recipe.lr, recipe.t0_steps)
    final = run.train_phase("kd", schedule, start, lambda state: kd_step(state, teacher, feeds, balance), own)
    final.teacher.load_state_dict(final.student.state_dict())
    run.export("final", final, "student", plan=own)


def teacher_plan(recipe: Recipe) -> tuple[Plan, dict[str, Tensor] | None]:
    """Plan and weights of `kd_teacher`: a file's, or random for a name; raises LearnerError if it can't see the images."""
    name = recipe.kd_teacher
    given = {"backbone": name} if name.endswith(".safetensors") else {"backbone": "random", "arch": name}
    plan, weights = open_backbone(replace(recipe, **given))
    network = build(plan)
    if recipe.frozen_blocks:
        raise LearnerError("frozen_blocks: kept tokens mean nothing to kd_teacher; use frozen_blocks = 0")
    if isinstance(network, Backbone) and recipe.image_size % network.patch:
        raise LearnerError(
            f'kd_teacher = "{name}": image_size {recipe.image_size} is no multiple of its patch {network.patch}'
        )
    return plan, weights


def first_quarter(schedule: Schedule) -> Schedule:
    """The first quarter of the epochs, one at least, at the rates that a whole training has there."""
    steps = max(1, len(schedule.alpha) // DEFECTIVE) * schedule.steps_per_epoch
    return replace(schedule, lr=schedule.lr[:steps])


def kd_step(state: State, teacher: Network, feeds: Sequence[Feed], balance: Balance | None = None) -> Losses:
    """One step on a batch of each feed, labels and answers together."""
    batches = [next_batch(feed, state.step) for feed in feeds]
    samples = sum(batch.whole for batch in batches)
    losses = optimiser_step(
        state, [(batch, kd_objective(teacher, batch.whole / samples, balance or {})) for batch in batches]
    )
    state.step += 1
    return losses


def kd_objective(teacher: Network, share: float, balance: Balance) -> Objective:
    """(1 - alpha) label loss + alpha T^2 KL to the teacher, which sees the same noised view; `share` of the step's images.

    Images without a label add nothing to the first term.
    """

    def objective(state: State, batch: Batch, part: slice) -> Terms:
        assert batch.labels is not None
        recipe, view = state.recipe, batch.views(part)[1]
        with autocast(state, view):
            with torch.no_grad():
                told = in_float32(teacher.classify(view))
            guess = in_float32(state.student.classify(view))
        loss, classes, taught = kd_loss(
            guess, told, batch.labels[part], recipe.kd_alpha, recipe.kd_temperature, batch.known,
            share * share_of(batch, part), **balance,
        )  # fmt: skip
        return Terms(loss, {"classes": classes, "taught": taught})

    return objective
