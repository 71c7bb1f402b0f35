"""`evolve`: self-training for few labels.

1. Fit the class head to the labels, and simple features beside it: this blend is the first teacher (`blend`).
2. Train the student on augmented views: with the teacher's probabilities, by self-distillation, and on the labels.
3. Refit the class head of each candidate model on its new embeddings, and choose a candidate on validation patients.
4. Refit the blend to labels and pseudo-labels.

Other recipe keys take pseudo-labels from a neighbour graph or from the EMA teacher, and leave out parts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from learner.data.plates import label_table
from learner.engine.step import State
from learner.engine.weight_averaging import Weights, recompute_batch_norm, soup, wise
from learner.errors import ManifestError
from learner.evaluation.auc import Curve
from learner.evaluation.model_choice import first_as_good, macro_curve
from learner.fits import logistic
from learner.fits.head_refit import FEW_PENALTY, TRAINED_SHARE
from learner.fits.label_propagation import pseudo_labels, soft_targets_by_rank
from learner.fits.logistic import inverse_spread
from learner.networks.blend import Blend, read_blend
from learner.networks.heads import Network
from learner.objectives.pseudo_targets import agreement, class_thresholds, hard_labels, shrunk_prevalence, soft_weights
from learner.objectives.teacher_student import pop_weight_mean, teacher_student_step
from learner.round.manifest import Sample
from learner.training.blend_fit import SimpleTable, blend_logits, fit_blend, simple_table
from learner.training.head_fit import logits_of, pseudo_by_image, refit, start_with_fitted_head
from learner.training.run import SCORING_BATCH, Run
from learner.training.supervised import label_balance, train_on_labels

MIXES = (0.25, 0.5, 0.75)  # shares of the teacher in the means of champion and teacher
UNTRAINED = {"refit"}  # candidates with the backbone of the model before the round
TOLERANCE = 0.02  # macro AUC on validation that all candidates may lose before the champion is kept


def train(run: Run) -> None:
    """Train T=0 if there is no parent, then the student on all train images, and export the chosen candidate."""
    recipe = run.recipe
    if not run.manifest.labelled and recipe.targets not in ("teacher", "blend"):
        raise ManifestError(
            f'manifest: no labelled train image, and targets = "{recipe.targets}" uses no teacher: label some train images, '
            'or set targets = "teacher"'
        )
    simple = simple_table(run) if recipe.blend else None
    if run.is_first_round:
        first = train_on_labels(run, partial(start_with_fitted_head, run), partial(add_blend, run, simple, None))
        start, before = run.from_student(first), read_blend(first.extra)
    else:
        start, before = run.from_parent, run.parent_blend()
    if recipe.class_hidden and recipe.refit != "none":
        run.notes = [
            *run.notes,
            f'refit = "{recipe.refit}" needs a linear class head; this one has three layers and is not refitted',
        ]
    table = run.compute_once("targets", lambda: pseudo_label_table(run, initial_state(run, start), before))
    unlabelled = run.feed(run.manifest.unlabelled, "unlabelled", recipe.local_views if recipe.lam else 0, False)
    labelled = run.labelled_feed("labelled") if run.manifest.labelled and recipe.label_weight else None
    schedule, balance = run.schedule(unlabelled, recipe.epochs, recipe.lr), label_balance(run)

    def start_phase(state: State) -> None:
        start(state)
        if recipe.targets == "teacher":
            refit_first_teacher(run, state)
        if "rate" in table:
            run.progress.write_note(state, "pseudo", {"pseudo_rate": float(table["rate"]), "pseudo_auc": None})

    final = run.train_phase(
        "evolve", schedule, start_phase, lambda state: teacher_student_step(state, unlabelled, labelled, table, balance)
    )
    champion = initial_state(run, start).student
    chosen = choose_candidate(run, final, champion, table)
    pseudo = pseudo_by_image(run, table) if recipe.targets == "blend" else None
    add_blend(run, simple, pseudo, final)
    run.export("final", final, "student", chosen)


def add_blend(run: Run, simple: SimpleTable | None, pseudo: Mapping[int, Tensor] | None, state: State) -> None:
    """Put the blend of the student and the simple features into the state; nothing without simple features."""
    if simple:
        state.extra |= fit_blend(run, state.student, simple, pseudo).tensors()


def initial_state(run: Run, start: Callable[[State], None]) -> State:
    """Return a state with the networks from before the round's main phase."""
    state = run.new_state("begun", run.schedule(run.unlabelled_feed(), 1, run.recipe.lr))
    start(state)
    return state


def pseudo_label_table(run: Run, state: State, before: Blend | None = None) -> dict[str, Tensor]:
    """Return the table of `teacher_student_step` for the unlabelled images, from the networks in `state`.

    before: the blend before the round, of the same networks; None = the network's answers alone.
    """
    recipe, samples = run.recipe, run.manifest.unlabelled
    labels = label_table(samples)
    prevalence = shrunk_prevalence(labels)
    table = {"prevalence": prevalence}
    if recipe.replay or recipe.agree == "soft":
        table["champion"] = logits_of(run, state.student, samples)
    if recipe.targets == "teacher":
        table["rate"] = torch.ones(())  # every image has a target
    if recipe.targets == "blend":
        table |= blend_targets(run, state, before, labels, prevalence)
    if recipe.targets == "graph":
        features = run.embeddings(state.teacher, samples)
        soft = pseudo_labels(features, labels, prevalence, recipe.neighbours, recipe.components)
        weight = torch.ones_like(soft)
        if recipe.agree == "teacher":
            weight = agreement(torch.logit(soft, 1e-4), logits_of(run, state.teacher, samples))
        elif recipe.agree == "heads":
            weight = agreement(
                *(logistic.fit(features, half, FEW_PENALTY)(features).float() for half in split_labels(labels))
            )
        elif recipe.agree == "soft":
            logit = torch.logit(soft, 1e-4)
            unlabelled = logit.where(
                labels.isnan(), torch.nan
            )  # logits of known labels are extreme: not in the reference
            weight = soft_weights(
                logit, unlabelled, torch.zeros(logit.shape[1])
            )  # logit 0 is the rank at the prevalence
        if recipe.thresholds:
            weight = weight * ~hard_labels(soft, *class_thresholds(soft, prevalence, recipe.kappa)).isnan()
        weight = weight.nan_to_num(0.0) * ~soft.isnan()  # findings without both classes have no target
        if recipe.poison_teacher:
            soft = torch.where(labels.isnan(), 1 - soft, labels)
        table |= {"soft": soft, "weight": torch.where(labels.isnan(), weight, 1.0), "rate": weight.mean()}
    return table


def blend_targets(
    run: Run, state: State, before: Blend | None, labels: Tensor, prevalence: Tensor
) -> dict[str, Tensor]:
    """Return soft targets from the blend's ranks, and their weights; labels (N, F) where they are known.

    nan with weight 0 for a finding with the same logit for every image.
    """
    samples = run.manifest.unlabelled
    logits = logits_of(run, state.student, samples)
    if before:
        logits = blend_logits(run, before, logits, samples)
    soft = soft_targets_by_rank(logits, prevalence)
    constant = inverse_spread(logits) == 0  # a finding that the teacher never learnt: the order of images is chance
    soft = torch.where(constant, torch.nan, soft)
    soft = torch.where(labels.isnan(), 1 - soft if run.recipe.poison_teacher else soft, labels)
    return {"soft": soft, "weight": (~soft.isnan()).float(), "rate": (~soft.isnan()).float().mean()}


def split_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels (N, F) twice, each with every second known label of each class; nan elsewhere."""
    first = torch.full_like(labels, float("nan"))
    second = first.clone()
    for i in range(labels.shape[1]):
        for value in (0.0, 1.0):
            rows = (labels[:, i] == value).nonzero()[:, 0]
            first[rows[::2], i], second[rows[1::2], i] = value, value
    return first, second


def refit_first_teacher(run: Run, state: State) -> None:
    """Refit the student's class head to graph and labels and copy it to the teacher, which so starts from them."""
    refit(run, state.student, 0.0 if run.is_first_round else TRAINED_SHARE)
    state.teacher.load_state_dict(state.student.state_dict())


def choose_candidate(run: Run, final: State, champion: Network, table: Mapping[str, Tensor] | None = None) -> str:
    """Load the chosen candidate into the student and return its name.

    Chooses the first candidate within one standard error of the best on validation; the first one where validation has
    too few images; the champion where all candidates are worse by more than TOLERANCE.
    """
    kinds = candidates(run, final, champion)
    final.extra.clear()  # not needed after the round
    samples = [sample for sample in run.manifest.of("validation") if sample.labelled]
    measured, weights = [], []
    for kind, start in kinds.items():
        final.student.load_state_dict({k: v.clone() for k, v in start.items()})
        if kind not in ("refit", "student", "teacher"):
            recompute_batch_norm(final.student.backbone, unaugmented_batches(run))
        share = TRAINED_SHARE if not run.is_first_round or kind not in UNTRAINED else 0.0
        refit(run, final.student, share, table)
        weights.append({k: v.clone() for k, v in final.student.state_dict().items()})
        auc = validation_auc(run, final.student, samples)
        if auc is None:
            break
        measured.append(auc)
    best = first_as_good(measured) if measured else 0
    name, kept = list(kinds)[best], weights[best]
    if measured:
        before = validation_auc(run, champion, samples)
        assert before is not None
        if before.value > max(candidate.value for candidate in measured) + TOLERANCE:
            name, kept = "champion", champion.state_dict()  # the round made the model worse
    final.student.load_state_dict(kept)
    return name


def candidates(run: Run, final: State, champion: Network) -> dict[str, Weights]:
    """Return the candidates of the recipe's `average` by name; docs/learning.md describes them.

    Candidates, in order of preference when validation can't distinguish them.
    """
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
    """Yield all train images unaugmented, in batches of nearly equal size."""
    feed, samples = run.feed(run.manifest.unlabelled, "plain", 0, True), len(run.manifest.unlabelled)
    yield from (feed.unaugmented(rows) for rows in np.array_split(np.arange(samples), -(-samples // SCORING_BATCH)))


def validation_auc(run: Run, network: Network, samples: Sequence[Sample]) -> Curve | None:
    """Return the macro AUC on samples with its error; None where a finding has too few images of a class."""
    if not samples:
        return None
    logits = logits_of(run, network, samples).numpy()
    return macro_curve(logits, label_table(samples).numpy(), [sample.patient for sample in samples])
