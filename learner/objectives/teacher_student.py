"""Objectives of `evolve` and `pretrain`: self-supervision and pseudo-labels on unlabelled images, labels in every step.

Weights and options come from the recipe. Pseudo-labels come from a table made before the phase (`targets = "graph"`) or
from the EMA teacher in each step.
"""

from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from learner.engine import distributed
from learner.engine.step import (
    Batch,
    Losses,
    Objective,
    State,
    Terms,
    check_collapse,
    in_float32,
    optimiser_step,
    parts,
    share_of,
)
from learner.engine.weight_averaging import Weights, ema_update_with_buffers, running_mean
from learner.networks.backbone import Backbone
from learner.networks.heads import Network
from learner.objectives.batchwise import WholeBatchRows, koleo_from_gradient, koleo_gradient, over_whole_batch
from learner.objectives.class_losses import Balance, label_loss
from learner.objectives.dino import autocast
from learner.objectives.distl_steps import Feed, next_batch
from learner.objectives.knowledge_distillation import bernoulli_kl
from learner.objectives.pseudo_targets import MeanPrediction, align, class_thresholds, ramp_up, soft_weights
from learner.objectives.self_supervised import MASK_NUMBERS, block_masks, koleo, sinkhorn

RAMP = 0.3  # share of the phase in which the pseudo-label loss ramps up
LATE = 0.9  # share of the phase after which self-supervised losses have half their weight: class losses dominate at the end
LAST = 5  # the running mean of weights is over the last fifth of the steps
MEAN = "swa."  # prefix of the running mean in `State.extra`
SCORES = "scores"  # in `State.extra`: the teacher's newest logits (N, F) of all unlabelled images


def teacher_student_step(
    state: State, unlabelled: Feed, labelled: Feed | None, table: dict[str, Tensor], balance: Balance | None = None
) -> Losses:
    """Make one step on unlabelled and labelled images together, then update the EMA teacher.

    table, by position in the unlabelled feed: `soft` (N, F) targets and `weight` (N, F), both absent where the teacher
    gives the targets; `champion` (N, F), logits of the model before this round, for `replay` and "soft"; `prevalence` (F,).
    """
    recipe = state.recipe
    batch, scored = next_batch(unlabelled, state.step), []
    objective = unlabelled_objective(table, collect_whole_batch(state, batch), scored)
    work: list[tuple[Batch, Objective]] = [(batch, objective)]
    if recipe.agree == "soft" and recipe.targets == "teacher":
        state.extra.setdefault(SCORES, table["champion"].clone())
    if labelled is not None:
        work.append((next_batch(labelled, state.step), label_objective(balance or {})))
    losses = optimiser_step(state, work, freeze_last=state.epoch < recipe.freeze_last)
    if SCORES in state.extra:
        store_scores(state, scored)
    momentum = float(state.schedule.momentum[state.step])
    ema_update_with_buffers(state.teacher, state.student, momentum)
    if recipe.average == "all":
        update_weight_mean(state)
    check_collapse(state, losses)
    state.step += 1
    return losses | {"momentum": momentum}


def update_weight_mean(state: State) -> None:
    """Update the mean of the student's weights over the last fifth of the steps (SWA, Izmailov et al. 2018)."""
    count = state.step - (state.schedule.steps - max(1, state.schedule.steps // LAST))
    if count >= 0:
        weights = {MEAN + name: value.clone() for name, value in state.student.state_dict().items()}
        mean = weights if count == 0 else {name: state.extra[name] for name in weights}
        state.extra |= running_mean(mean, weights, count)


def pop_weight_mean(state: State) -> Weights:
    """Return the mean of `update_weight_mean` and remove it from the state."""
    return {name.removeprefix(MEAN): state.extra.pop(name) for name in [*state.extra] if name.startswith(MEAN)}


def label_objective(balance: Balance) -> Objective:
    """Return the objective label_weight L_label on the augmented view."""

    def objective(state: State, batch: Batch, part: slice) -> Terms:
        assert batch.labels is not None
        views = batch.views(part)
        with autocast(state, views[0]):
            logits = in_float32(state.student.classify(views[1]))
        loss = label_loss(logits, batch.labels[part], batch.known, **balance)
        return Terms(state.recipe.label_weight * loss, {"labels": loss})

    return objective


def collect_whole_batch(state: State, batch: Batch) -> WholeBatchRows:
    """Return what KoLeo and Sinkhorn need from the whole batch, in a forward pass without gradients.

    Empty where one rank processes the batch in one part, or where the recipe uses neither loss.
    """
    recipe, slices = state.recipe, parts(batch.size, state.micro)
    use_sinkhorn = recipe.centring == "sinkhorn"
    if (distributed.world_size() == 1 and len(slices) == 1) or not (recipe.koleo or use_sinkhorn):
        return {}
    rows: dict[str, list[Tensor]] = {"dino": [], "ibot": [], "koleo": []}
    state.student.eval()  # no stochastic depth, and batch norm keeps its statistics
    for part in slices:
        views = batch.views(part)
        assert batch.index is not None
        mask = draw_masks(state, batch.index[part], views[0]) if recipe.ibot else None
        with torch.no_grad(), autocast(state, views[0]):
            teacher, patches = encode(state.teacher, views[:2], None, mask)
            rows["dino"].append(in_float32(state.teacher.head(teacher)))
            rows["ibot"] += [] if patches is None else [in_float32(patches)]
            student = encode(state.student, views[: 1 if mask is None else 2], mask, mask)[0]
            rows["koleo"].append(in_float32(student[: len(views[0])]))
    state.student.train()  # after running out of memory above, the repeated step sets this too
    like = next(state.student.parameters())
    width = {"dino": recipe.prototypes, "ibot": recipe.prototypes, "koleo": state.student.backbone.dim}
    makers = {"koleo": koleo_gradient} if recipe.koleo else {}
    if use_sinkhorn:
        names = ["dino"] * bool(recipe.lam) + ["ibot"] * bool(recipe.ibot)
        makers |= dict.fromkeys(names, partial(sinkhorn, temperature=recipe.teacher_temp))
    starts = [part.start for part in slices]
    return {
        name: dict(zip(starts, over_whole_batch(rows[name], width[name], make, like), strict=True))
        for name, make in makers.items()
    }


def unlabelled_objective(table: dict[str, Tensor], whole: WholeBatchRows, scored: list[Tensor]) -> Objective:
    """Return the objective lam L_dino + ibot L_ibot + koleo L_koleo + pseudo_weight ramp L_pseudo + replay L_champion.

    Appends position and teacher logits, (b, 1 + F), of each part to `scored` where the recipe keeps scores.
    """

    def objective(state: State, batch: Batch, part: slice) -> Terms:
        recipe, share = state.recipe, share_of(batch, part)
        time = state.step / max(1, state.schedule.steps)
        self_weight = 0.5 if time > LATE else 1.0
        views, index = batch.views(part), batch.index
        assert index is not None
        size = views[0].shape[0]
        classes_only = not (recipe.lam or recipe.ibot or recipe.koleo)  # then one view for each network is enough
        mask = draw_masks(state, index[part], views[0]) if recipe.ibot else None
        with autocast(state, views[0]):
            with torch.no_grad():
                taught, taught_patches = encode(state.teacher, views[: 1 if classes_only else 2], None, mask)
                teacher_class = in_float32(state.teacher.cls_head(taught[:size]))
            encoded, patches = encode(state.student, views[1:2] if classes_only else views, mask, mask)
            augmented = encoded if classes_only else encoded[size : 2 * size]
            classes = in_float32(state.student.cls_head(augmented))
            terms = Terms(classes.sum() * 0.0, embeddings=taught[:size])

            def assigned(name: str, rows: Tensor) -> Tensor | None:
                if recipe.centring == "centre":
                    return None
                return whole[name][part.start] if name in whole else sinkhorn(rows, recipe.teacher_temp)

            def add(name: str, weight: float, loss: Tensor) -> None:
                terms.loss = terms.loss + weight * (loss * share)
                terms.logged[name] = loss * share

            if recipe.lam:
                with torch.no_grad():
                    teacher_head = in_float32(state.teacher.head(taught))
                targets = assigned("dino", teacher_head)
                student_head = in_float32(state.student.head(encoded))
                loss = state.centres["dino"](student_head, teacher_head, assigned=targets)
                add("dino", self_weight * recipe.lam, loss)
                terms.centre_rows["dino"] = teacher_head
            if mask is not None:
                assert patches is not None and taught_patches is not None
                teacher_rows = in_float32(taught_patches)
                targets = assigned("ibot", teacher_rows)
                loss = state.centres["ibot"](in_float32(patches), teacher_rows, mask, assigned=targets)
                add("ibot", self_weight * recipe.ibot, loss)
                terms.centre_rows["ibot"] = teacher_rows
            if recipe.koleo:
                plain, rows = in_float32(encoded[:size]), whole.get("koleo")
                loss = koleo_from_gradient(plain, rows[part.start], share) if rows else koleo(plain)
                add("koleo", self_weight * recipe.koleo, loss)
        if recipe.align:
            terms.centre_rows["answer"] = teacher_class.sigmoid()
        if recipe.targets != "none":
            soft, weight = targets_and_weights(state, table, index[part], teacher_class)
            if SCORES in state.extra:
                positions = index[part, None].to(teacher_class).double()
                scored.append(torch.cat([positions, teacher_class.double()], 1))
            each = F.binary_cross_entropy_with_logits(classes, soft.nan_to_num(0.5), reduction="none")
            add("pseudo", recipe.pseudo_weight * ramp_up(time / RAMP), (each * weight).sum() / each.numel())
        if recipe.replay and "champion" in table:
            add("replay", recipe.replay, bernoulli_kl(classes, table["champion"][index[part]], recipe.kd_temperature))
        return terms

    return objective


def targets_and_weights(
    state: State, table: dict[str, Tensor], index: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """Return soft targets (b, F) and their weights, from the table or else from the teacher's logits (b, F).

    index (b,): positions in the table. The teacher's logits are aligned with the prevalence with the recipe key `align`.
    """
    if "soft" in table:
        soft = table["soft"][index]
        return soft, table["weight"][index] * ~soft.isnan()
    weight = torch.ones_like(teacher)
    if SCORES in state.extra:
        scores = state.extra[SCORES].to(teacher)
        weight = soft_weights(teacher, scores, class_thresholds(scores, table["prevalence"].to(teacher), 1.0)[1])
    if state.recipe.align:
        mean, prevalence = cast(MeanPrediction, state.centres["answer"]).mean[0], table["prevalence"].to(teacher)
        teacher = align(teacher, torch.where(mean.isnan(), prevalence, mean), prevalence)
    soft = (-teacher if state.recipe.poison_teacher else teacher).sigmoid()
    return soft, weight


def store_scores(state: State, scored: list[Tensor]) -> None:
    """Replace the stored teacher logits of this step's images, of all ranks; scored: (b, 1 + F) position and logits."""
    scores = state.extra[SCORES]
    empty = scores.new_empty(0, 1 + scores.shape[1], dtype=torch.float64)
    rows, _ = distributed.gather_rows(torch.cat([empty, *scored]))
    scores[rows[:, 0].long()] = rows[:, 1:].to(scores)


def encode(
    network: Network, views: list[Tensor], masked: Tensor | None, wanted: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return embeddings (V b, D) of all views, view-major, and prototype logits (M, K) of the wanted patches.

    masked, wanted: bool (2 b, h, w) of the two global views; the mask token replaces masked patches. Patches are None
    where `wanted` is None.
    """
    if wanted is None:
        return network.encode(views), None
    backbone = cast(Backbone, network.backbone)
    assert network.patch_head is not None
    tokens = backbone.tokens(torch.cat(views[:2]), masked, network.mask)
    embeddings = [backbone.embedding(tokens)] + ([network.encode(views[2:])] if len(views) > 2 else [])
    patches = tokens[:, -wanted[0].numel() :][wanted.flatten(1)]
    return torch.cat(embeddings), network.patch_head(patches)


def draw_masks(state: State, index: Tensor, view: Tensor) -> Tensor:
    """Return masks, bool (2 b, h, w), of the two global views; random numbers from seed, step and position of an image."""
    backbone = cast(Backbone, state.student.backbone)
    is_tokens = view.ndim == 3
    patches = view.shape[1] - backbone.vit.num_prefix_tokens if is_tokens else (view.shape[-1] // backbone.patch) ** 2
    place = [state.recipe.seed, 77, state.step]
    numbers = [np.random.default_rng([*place, int(i)]).random((2, MASK_NUMBERS), dtype=np.float32) for i in index]
    drawn = torch.from_numpy(np.stack(numbers, 1)).flatten(0, 1)
    return block_masks(drawn, int(patches**0.5)).to(view.device)
