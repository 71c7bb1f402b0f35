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
from learner.engine.weight_averaging import Weights, settle, soup, wise
from learner.evaluation.auc import Curve
from learner.evaluation.model_choice import first_as_good, macro_curve
from learner.networks.heads import Network
from learner.objectives import logistic
from learner.objectives.class_losses import weight_table
from learner.objectives.head_refit import FEW_PENALTY, TRAINED, answer, mean, only
from learner.objectives.label_propagation import both_classes, pseudo_labels
from learner.objectives.pseudo_targets import agreement, class_thresholds, outside, shrunk_prevalence, soft_weights
from learner.objectives.teacher_student import evolve, take_mean
from learner.round.manifest import ManifestError, Sample
from learner.round.run import SCORED, Run
from learner.round.supervised import balance_of, learn_labels

MIXES = (0.25, 0.5, 0.75)  # of champion and candidate, beside the two themselves
UNTRAINED = {"refit"}  # candidates whose backbone is that of the model before the round
LOST = 0.02  # macro AUC on validation: what a round may seem to lose by chance before it is taken back


def run(run: Run) -> None:
    """T=0 when there is no parent, then one round on every train image."""
    recipe = run.recipe
    if not run.round.labelled and recipe.targets != "teacher":
        raise ManifestError(
            f'manifest: no labelled train image, and targets = "{recipe.targets}" asks no teacher: label some train images, '
            'or leave targets = "teacher"'
        )
    start = run.from_student(learn_labels(run, partial(probe, run))) if run.first else run.from_parent
    if recipe.class_hidden and recipe.refit != "none":
        run.notes = [
            *run.notes,
            f'refit = "{recipe.refit}" is for a linear class head: this one, of three layers, stays',
        ]
    table = run.once("targets", lambda: targets(run, begun(run, start)))
    unlabelled = run.feed(run.round.unlabelled, "unlabelled", recipe.local_views if recipe.lam else 0, False)
    labelled = run.labelled("labelled") if run.round.labelled and recipe.label_weight else None
    schedule, balance = run.schedule(unlabelled, recipe.epochs, recipe.lr), balance_of(run)

    def begin(state: State) -> None:
        start(state)
        if recipe.targets == "teacher":
            teach(run, state)
        if "rate" in table:
            run.teller.note(state, "pseudo", {"pseudo_rate": float(table["rate"]), "pseudo_auc": None})

    final = run.train("evolve", schedule, begin, lambda state: evolve(state, unlabelled, labelled, table, balance))
    champion = begun(run, start).student
    chosen = choose(run, final, champion)
    run.export("final", final, "student", chosen)


def begun(run: Run, start: Callable[[State], None]) -> State:
    """The networks as the round found them."""
    state = run.state("begun", run.schedule(run.unlabelled(), 1, run.recipe.lr))
    start(state)
    return state


def probe(run: Run, state: State) -> None:
    """Before anything is fine-tuned the class head is fitted on what the backbone sees as it is (LP-FT)."""
    run.from_backbone(state)
    fit_head(run, state.student)
    state.teacher.load_state_dict(state.student.state_dict())


def targets(run: Run, state: State) -> dict[str, Tensor]:
    """What the unlabelled images are taught, by image: see `learner.objectives.teacher_student.evolve`."""
    recipe, samples = run.recipe, run.round.unlabelled
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
            weight = agreement(*(logistic.fit(seen, half, FEW_PENALTY)(seen).float() for half in halves(labels)))
        elif recipe.agree == "soft":
            logit = torch.logit(soft, 1e-4)
            unsure = logit.where(labels.isnan(), torch.nan)  # a label would stand far out and make all others doubtful
            weight = soft_weights(logit, unsure, torch.zeros(logit.shape[1]))  # ranks are centred: 0 is the prevalence
        if recipe.thresholds:
            weight = weight * ~outside(soft, *class_thresholds(soft, prevalence, recipe.kappa)).isnan()
        weight = weight.nan_to_num(0.0) * ~soft.isnan()  # a finding without both classes has no target to agree on
        if recipe.poison_teacher:
            soft = torch.where(labels.isnan(), 1 - soft, labels)
        table |= {"soft": soft, "weight": torch.where(labels.isnan(), weight, 1.0), "rate": weight.mean()}
    return table


def halves(labels: Tensor) -> tuple[Tensor, Tensor]:
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
        samples, labels = run.round.labelled, label_table(run.round.labelled)
        seen, weights = run.embeddings(network, samples), label_weights(run, labels)
        set_head(network, logistic.fit(seen, labels, FEW_PENALTY, weights))


def label_weights(run: Run, labels: Tensor) -> Tensor | None:
    """Of the recipe's `balance`; None: all alike."""
    weights = weight_table(labels.to(run.device), balance_of(run))
    return None if weights is None else weights.cpu()


def head_of(network: Network) -> logistic.Linear:
    """The linear class head as it is, on the host."""
    layer = cast(nn.Linear, network.cls_head.mlp[-1])
    return logistic.Linear(layer.weight.detach().double().cpu(), layer.bias.detach().double().cpu())


def set_head(network: Network, head: logistic.Linear) -> None:
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
    recipe, samples = run.recipe, run.round.unlabelled
    if recipe.refit == "none" or recipe.class_hidden or not run.round.labelled:
        return
    before, labels = head_of(network), label_table(samples)
    if recipe.refit == "linear":
        fit_head(run, network)
    else:
        seen, weights = run.embeddings(network, samples), label_weights(run, labels)
        fitted = answer(seen, labels, recipe.neighbours, recipe.components, weights)
        set_head(network, mean(fitted, before, seen, own) if own else fitted)
    if not run.first:
        set_head(network, only(both_classes(labels), head_of(network), before))


def teach(run: Run, state: State) -> None:
    """Both networks := the model before the round, its head fitted anew: neighbours and labels are the first teacher."""
    refit(run, state.student, 0.0 if run.first else TRAINED)
    state.teacher.load_state_dict(state.student.state_dict())


def choose(run: Run, final: State, champion: Network) -> str:
    """The student := the first candidate that validation can't tell from the best; its name.

    Where validation has too few images it is the first; where all seem to do harm it is the champion.
    """
    kinds = candidates(run, final, champion)
    final.extra.clear()  # of no use after the round
    samples = [sample for sample in run.round.of("validation") if sample.labelled]
    measured, weights = [], []
    for kind, start in kinds.items():
        final.student.load_state_dict({k: v.clone() for k, v in start.items()})
        if kind not in ("refit", "student", "teacher"):
            settle(final.student.backbone, originals(run))
        refit(run, final.student, TRAINED if not run.first or kind not in UNTRAINED else 0.0)
        weights.append({k: v.clone() for k, v in final.student.state_dict().items()})
        seen = quality(run, final.student, samples)
        if seen is None:
            break
        measured.append(seen)
    place = first_as_good(measured) if measured else 0
    name, kept = list(kinds)[place], weights[place]
    if measured:
        before = quality(run, champion, samples)
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
            means = {"soup": soup([student, teacher]), "swa": take_mean(final)}
            return {"refit": before, **mixed, "teacher": teacher, **means, "student": student}
        case _:
            return {"teacher": teacher, "student": student}


def originals(run: Run) -> Iterator[Tensor]:
    """All train images without noise, in even batches."""
    feed, samples = run.feed(run.round.unlabelled, "plain", 0, True), len(run.round.unlabelled)
    yield from (feed.originals(rows) for rows in np.array_split(np.arange(samples), -(-samples // SCORED)))


def quality(run: Run, network: Network, samples: Sequence[Sample]) -> Curve | None:
    """Macro AUC on these images with its error; None where a finding has too few of a class to choose by."""
    if not samples:
        return None
    logits = logits_of(run, network, samples).numpy()
    return macro_curve(logits, label_table(samples).numpy(), [sample.patient for sample in samples])


def logits_of(run: Run, network: Network, samples: Sequence[Sample]) -> Tensor:
    """What a network says of images without noise: (N, F), float32 on the host."""
    return network.cls_head(run.embeddings(network, samples).to(run.device)).float().detach().cpu()
