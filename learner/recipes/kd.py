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
from learner.engine.step import Batch, Losses, Objective, State, Terms, full, optimise, share_of
from learner.networks.architecture import BackboneError, Plan
from learner.networks.backbone import Backbone, build, open_backbone
from learner.networks.heads import Network
from learner.objectives.class_losses import Balance
from learner.objectives.correction import Feed, next_batch, supervise
from learner.objectives.dino import autocast
from learner.objectives.knowledge_distillation import kd_loss
from learner.round.manifest import ManifestError
from learner.round.recipe import Recipe
from learner.round.run import Run
from learner.round.supervised import balance_of, learn_labels

DEFECTIVE = 4  # one in so many epochs: the published 50 of 200


def run(run: Run) -> None:
    """T=0 when there is no parent, the teacher, the student. A parent goes on as the student, in `self` as the teacher."""
    recipe, strategy = run.recipe, run.recipe.kd_strategy
    if not run.round.labelled:
        raise ManifestError(
            "manifest: no labelled train image: kd trains on labels; label some, or use recipe distl with a parent"
        )
    labelled, balance = run.labelled("t0"), balance_of(run)
    alone = run.schedule(labelled, recipe.t0_epochs, recipe.t0_lr, recipe.t0_steps)

    def learn(state: State) -> Losses:
        return supervise(state, labelled, balance)

    plan, weights = other_network(recipe) if strategy not in ("base", "self") else (run.plan, None)
    if strategy == "reversed" and not run.first:
        raise ManifestError('kd_strategy = "reversed" changes networks and has no parent; use "standard" from now on')
    t0 = learn_labels(run, run.from_backbone) if run.first else None
    if strategy == "base":
        final = t0 or run.train("kd", alone, run.from_parent, learn)
        return run.export("final", final, "student")

    start, own = run.from_backbone if run.first else run.from_parent, run.plan
    if strategy == "reversed" or strategy == "self":
        teacher = t0.student if t0 else run.champion()
        start, own = (run.from_weights(weights), plan) if strategy == "reversed" else (run.from_backbone, run.plan)
    else:
        length = defective(alone) if strategy == "defective" else alone
        teacher = run.train("teacher", length, run.from_weights(weights), learn, plan).student
    teacher.to(run.device).eval().requires_grad_(False)

    rest = [sample for sample in run.round.unlabelled if not sample.labelled]
    feeds = [labelled, run.feed(rest, "unlabelled", 0, False)] if rest and recipe.kd_alpha else [labelled]
    schedule = run.schedule(labelled, recipe.epochs, recipe.lr, recipe.t0_steps)
    final = run.train("kd", schedule, start, lambda state: be_taught(state, teacher, feeds, balance), own)
    final.teacher.load_state_dict(final.student.state_dict())
    run.export("final", final, "student", plan=own)


def other_network(recipe: Recipe) -> tuple[Plan, dict[str, Tensor] | None]:
    """Plan and weights of `kd_teacher`: a file's, or random for a name; raises BackboneError if it can't see the images."""
    name = recipe.kd_teacher
    given = {"backbone": name} if name.endswith(".safetensors") else {"backbone": "random", "arch": name}
    plan, weights = open_backbone(replace(recipe, **given))
    network = build(plan)
    if recipe.frozen_blocks:
        raise BackboneError("frozen_blocks: kept tokens mean nothing to kd_teacher; use frozen_blocks = 0")
    if isinstance(network, Backbone) and recipe.image_size % network.patch:
        raise BackboneError(
            f'kd_teacher = "{name}": image_size {recipe.image_size} is no multiple of its patch {network.patch}'
        )
    return plan, weights


def defective(schedule: Schedule) -> Schedule:
    """The first quarter of the epochs, one at least, at the rates that a whole training has there."""
    steps = max(1, len(schedule.alpha) // DEFECTIVE) * schedule.steps_per_epoch
    return replace(schedule, lr=schedule.lr[:steps])


def be_taught(state: State, teacher: Network, feeds: Sequence[Feed], balance: Balance | None = None) -> Losses:
    """One step on a batch of each feed, labels and answers together."""
    batches = [next_batch(feed, state.step) for feed in feeds]
    samples = sum(batch.whole for batch in batches)
    losses = optimise(state, [(batch, teaching(teacher, batch.whole / samples, balance or {})) for batch in batches])
    state.step += 1
    return losses


def teaching(teacher: Network, share: float, balance: Balance) -> Objective:
    """(1 - alpha) label loss + alpha T^2 KL to the teacher, which sees the same noised view; `share` of the step's images.

    Images without a label add nothing to the first term.
    """

    def objective(state: State, batch: Batch, part: slice) -> Terms:
        assert batch.labels is not None
        recipe, view = state.recipe, batch.views(part)[1]
        with autocast(state, view):
            with torch.no_grad():
                told = full(teacher.classify(view))
            guess = full(state.student.classify(view))
        loss, classes, taught = kd_loss(
            guess, told, batch.labels[part], recipe.kd_alpha, recipe.kd_temperature, batch.known,
            share * share_of(batch, part), **balance,
        )  # fmt: skip
        return Terms(loss, {"classes": classes, "taught": taught})

    return objective
