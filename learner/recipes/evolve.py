"""`evolve`: the same three signals, made to work with few labels.

Images that look alike share labels along a neighbour graph of the model's own embeddings, rebuilt every round: the class
head fitted to them and to the labels is the teacher's. A student that sees noised images learns the teacher's soft answers,
and the teacher follows it; from random weights labelled images are in every step too. At the end neighbours and labels have
their say once more, in the new features, and what was trained is kept unless validation patients prefer something else.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from learner.data.plates import label_table
from learner.engine.step import State
from learner.engine.weight_averaging import Weights, recompute_batch_norm, soup, wise
from learner.errors import ManifestError
from learner.evaluation.auc import Curve
from learner.evaluation.model_choice import first_as_good, macro_curve
from learner.networks.heads import Network
from learner.objectives import logistic
from learner.objectives.class_losses import weight_table
from learner.objectives.head_refit import (
    FEW_PENALTY,
    TRAINED_SHARE,
    blend_heads,
    combine_by_finding,
    fit_graph_and_labels,
)
from learner.objectives.label_propagation import has_both_classes, pseudo_labels
from learner.objectives.pseudo_targets import agreement, class_thresholds, hard_labels, shrunk_prevalence, soft_weights
from learner.objectives.teacher_student import pop_weight_mean, teacher_student_step
from learner.round.manifest import Sample
from learner.training.run import SCORING_BATCH, Run
from learner.training.supervised import label_balance, train_on_labels

MIXES = (0.25, 0.5, 0.75)  # of champion and candidate, beside the two themselves
UNTRAINED = {"refit"}  # candidates whose backbone is that of the model before the round
LOST = 0.02  # macro AUC on validation: what a round may seem to lose by chance before it is taken back


def train(run: Run) -> None:
    """T=0 when there is no parent, then one round on every train image."""
    recipe = run.recipe
    if not run.manifest.labelled and recipe.targets != "teacher":
        raise ManifestError(
            f'manifest: no labelled train image, and targets = "{recipe.targets}" asks no teacher: label some train images, '
            'or leave targets = "teacher"'
        )
    start = (
        run.from_student(train_on_labels(run, partial(start_with_fitted_head, run)))
        if run.is_first_round
        else run.from_parent
    )
    if recipe.class_hidden and recipe.refit != "none":
        run.notes = [
            *run.notes,
            f'refit = "{recipe.refit}" is for a linear class head: this one, of three layers, stays',
        ]
    table = run.compute_once("targets", lambda: pseudo_label_table(run, initial_state(run, start)))
    unlabelled = run.feed(run.manifest.unlabelled, "unlabelled", recipe.local_views if recipe.lam else 0, False)
    labelled = run.labelled_feed("labelled") if run.manifest.labelled and recipe.label_weight else None
    schedule, balance = run.schedule(unlabelled, recipe.epochs, recipe.lr), label_balance(run)

    def begin(state: State) -> None:
        start(state)
        if recipe.targets == "teacher":
            refit_first_teacher(run, state)
        if "rate" in table:
            run.progress.write_note(state, "pseudo", {"pseudo_rate": float(table["rate"]), "pseudo_auc": None})

    final = run.train_phase(
        "evolve", schedule, begin, lambda state: teacher_student_step(state, unlabelled, labelled, table, balance)
    )
    champion = initial_state(run, start).student
    chosen = choose_candidate(run, final, champion)
    run.export("final", final, "student", chosen)


def initial_state(run: Run, start: Callable[[State], None]) -> State:
    """The networks as the round found them."""
    state = run.new_state("begun", run.schedule(run.unlabelled_feed(), 1, run.recipe.lr))
    start(state)
    return state


def start_with_fitted_head(run: Run, state: State) -> None:
    """Before anything is fine-tuned the class head is fitted on what the backbone sees as it is (LP-FT)."""
    run.from_backbone(state)
    fit_head(run, state.student)
    state.teacher.load_state_dict(state.student.state_dict())


def pseudo_label_table(run: Run, state: State) -> dict[str, Tensor]:
    """What the unlabelled images are taught, by image: see `learner.objectives.teacher_student.teacher_student_step`."""
    recipe, samples = run.recipe, run.manifest.unlabelled
    labels = label_table(samples)
    prevalence = shrunk_prevalence(labels)
    table = {"prevalence": prevalence}
    if recipe.replay or recipe.agree == "soft":
        table["champion"] = logits_of(run, state.student, samples)
    if recipe.targets == "teacher":
        table["rate"] = torch.ones(())  # a soft answer for every image
    if recipe.targets == "graph":
        seen = run.embeddings(state.teacher, samples)
        soft = pseudo_labels(seen, labels, prevalence, recipe.neighbours, recipe.components)
        weight = torch.ones_like(soft)
        if recipe.agree == "teacher":
            weight = agreement(torch.logit(soft, 1e-4), logits_of(run, state.teacher, samples))
        elif recipe.agree == "heads":
            weight = agreement(*(logistic.fit(seen, half, FEW_PENALTY)(seen).float() for half in split_labels(labels)))
        elif recipe.agree == "soft":
            logit = torch.logit(soft, 1e-4)
            unsure = logit.where(labels.isnan(), torch.nan)  # a label would stand far out and make all others doubtful
            weight = soft_weights(logit, unsure, torch.zeros(logit.shape[1]))  # ranks are centred: 0 is the prevalence
        if recipe.thresholds:
            weight = weight * ~hard_labels(soft, *class_thresholds(soft, prevalence, recipe.kappa)).isnan()
        weight = weight.nan_to_num(0.0) * ~soft.isnan()  # a finding without both classes has no target to agree on
        if recipe.poison_teacher:
            soft = torch.where(labels.isnan(), 1 - soft, labels)
        table |= {"soft": soft, "weight": torch.where(labels.isnan(), weight, 1.0), "rate": weight.mean()}
    return table


def split_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labelled images in two halves, every other one of each class."""
    first = torch.full_like(labels, float("nan"))
    second = first.clone()
    for i in range(labels.shape[1]):
        for value in (0.0, 1.0):
            rows = (labels[:, i] == value).nonzero()[:, 0]
            first[rows[::2], i], second[rows[1::2], i] = value, value
    return first, second


def fit_head(run: Run, network: Network) -> None:
    """A linear class head := the logistic regression of the labels on what this network sees."""
    if run.recipe.class_hidden == 0:
        samples, labels = run.manifest.labelled, label_table(run.manifest.labelled)
        seen, weights = run.embeddings(network, samples), label_weights(run, labels)
        set_head(network, logistic.fit(seen, labels, FEW_PENALTY, weights))


def label_weights(run: Run, labels: Tensor) -> Tensor | None:
    """Of the recipe's `balance`; None: all alike."""
    weights = weight_table(labels.to(run.device), label_balance(run))
    return None if weights is None else weights.cpu()


def head_of(network: Network) -> logistic.LinearHead:
    """The linear class head as it is, on the host."""
    layer = cast(nn.Linear, network.cls_head.mlp[-1])
    return logistic.LinearHead(layer.weight.detach().double().cpu(), layer.bias.detach().double().cpu())


def set_head(network: Network, head: logistic.LinearHead) -> None:
    """The linear class head := this answer."""
    layer = cast(nn.Linear, network.cls_head.mlp[-1])
    with torch.no_grad():
        layer.weight.copy_(head.weight)
        layer.bias.copy_(head.bias)


def refit(run: Run, network: Network, own: float = 0.0) -> None:
    """The last correction: the class head fitted to convergence on what this network sees, to labels or graph and labels.

    `own`: the share that the head keeps which the network was trained with, beside graph and labels. A finding whose
    labels of this round don't hold both classes, or that has none, keeps what the parent's head knew of it.
    """
    recipe, samples = run.recipe, run.manifest.unlabelled
    if recipe.refit == "none" or recipe.class_hidden or not run.manifest.labelled:
        return
    before, labels = head_of(network), label_table(samples)
    if recipe.refit == "linear":
        fit_head(run, network)
    else:
        seen, weights = run.embeddings(network, samples), label_weights(run, labels)
        fitted = fit_graph_and_labels(seen, labels, recipe.neighbours, recipe.components, weights)
        set_head(network, blend_heads(fitted, before, seen, own) if own else fitted)
    if not run.is_first_round:
        set_head(network, combine_by_finding(has_both_classes(labels), head_of(network), before))


def refit_first_teacher(run: Run, state: State) -> None:
    """Both networks := the model before the round, its head fitted anew: neighbours and labels are the first teacher."""
    refit(run, state.student, 0.0 if run.is_first_round else TRAINED_SHARE)
    state.teacher.load_state_dict(state.student.state_dict())


def choose_candidate(run: Run, final: State, champion: Network) -> str:
    """The student := the first candidate that validation can't tell from the best; its name.

    Where validation has too few images it is the first; where all seem to do harm it is the champion.
    """
    kinds = candidates(run, final, champion)
    final.extra.clear()  # of no use after the round
    samples = [sample for sample in run.manifest.of("validation") if sample.labelled]
    measured, weights = [], []
    for kind, start in kinds.items():
        final.student.load_state_dict({k: v.clone() for k, v in start.items()})
        if kind not in ("refit", "student", "teacher"):
            recompute_batch_norm(final.student.backbone, unaugmented_batches(run))
        refit(run, final.student, TRAINED_SHARE if not run.is_first_round or kind not in UNTRAINED else 0.0)
        weights.append({k: v.clone() for k, v in final.student.state_dict().items()})
        seen = validation_auc(run, final.student, samples)
        if seen is None:
            break
        measured.append(seen)
    place = first_as_good(measured) if measured else 0
    name, kept = list(kinds)[place], weights[place]
    if measured:
        before = validation_auc(run, champion, samples)
        assert before is not None
        if before.value > max(one.value for one in measured) + LOST:
            name, kept = "champion", champion.state_dict()  # the round did harm: the gate will see the same model again
    final.student.load_state_dict(kept)
    return name


def candidates(run: Run, final: State, champion: Network) -> dict[str, Weights]:
    """What may be kept, what is kept when nothing tells them apart first: see `average` in docs/learning.md."""
    before, student, teacher = (net.state_dict() for net in (champion, final.student, final.teacher))
    mixed = {f"wise {a:g}": wise(before, teacher, a) for a in MIXES}
    match run.recipe.average:
        case "trained":
            return {"teacher": teacher, "wise 0.5": mixed["wise 0.5"], "refit": before}
        case "least":
            return {"refit": before, "wise 0.5": mixed["wise 0.5"], "teacher": teacher}
        case "wise":
            return {"wise 0.5": mixed["wise 0.5"]}
        case "all":
            means = {"soup": soup([student, teacher]), "swa": pop_weight_mean(final)}
            return {"refit": before, **mixed, "teacher": teacher, **means, "student": student}
        case _:
            return {"teacher": teacher, "student": student}


def unaugmented_batches(run: Run) -> Iterator[Tensor]:
    """All train images without noise, in even batches."""
    feed, samples = run.feed(run.manifest.unlabelled, "plain", 0, True), len(run.manifest.unlabelled)
    yield from (feed.unaugmented(rows) for rows in np.array_split(np.arange(samples), -(-samples // SCORING_BATCH)))


def validation_auc(run: Run, network: Network, samples: Sequence[Sample]) -> Curve | None:
    """Macro AUC on these images with its error; None where a finding has too few of a class to choose by."""
    if not samples:
        return None
    logits = logits_of(run, network, samples).numpy()
    return macro_curve(logits, label_table(samples).numpy(), [sample.patient for sample in samples])


def logits_of(run: Run, network: Network, samples: Sequence[Sample]) -> Tensor:
    """What a network says of images without noise: (N, F), float32 on the host."""
    return network.cls_head(run.embeddings(network, samples).to(run.device)).float().detach().cpu()
