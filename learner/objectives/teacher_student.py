"""The costs of `evolve`: several self-supervisions and pseudo-labels on unlabelled images, labels in every step.

Each objective says what a part of a batch costs; weights and choices come from the recipe. Pseudo-labels come in as a
table made before the phase (`graph`), or from the teacher as it goes. Knows no file and no clock.
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
from learner.objectives.correction import Feed, next_batch
from learner.objectives.dino import autocast
from learner.objectives.knowledge_distillation import bernoulli_kl
from learner.objectives.pseudo_targets import MeanPrediction, align, class_thresholds, ramp_up, soft_weights
from learner.objectives.self_supervised import MASK_NUMBERS, block_masks, koleo, sinkhorn

RAMP = 0.3  # share of the phase after which pseudo-labels count fully
LATE = 0.9  # from here on self-supervision counts half: the last word is the classes'
LAST = 5  # one in so many steps, the last ones, are in the running mean of weights
MEAN = "swa."  # its names among what a state carries along
SCORES = "scores"  # and that of the teacher's newest logit of each unlabelled image (N, F)


def teacher_student_step(
    state: State, unlabelled: Feed, labelled: Feed | None, table: dict[str, Tensor], balance: Balance | None = None
) -> Losses:
    """One step: unlabelled images and labelled ones over_whole_batch, then the teacher follows, and its buffers are copied.

    table: `soft` (N, F) targets and `weight` (N, F) by image of the unlabelled feed, or neither (the teacher's answers);
    `champion` (N, F), logits of the model before this round, where something asks for them; `prevalence` (F,).
    """
    recipe = state.recipe
    batch, said = next_batch(unlabelled, state.step), []
    work: list[tuple[Batch, Objective]] = [(batch, unsupervised(table, look_ahead(state, batch), said))]
    if recipe.agree == "soft" and recipe.targets == "teacher":
        state.extra.setdefault(SCORES, table["champion"].clone())
    if labelled is not None:
        work.append((next_batch(labelled, state.step), supervised(balance or {})))
    losses = optimiser_step(state, work, freeze_last=state.epoch < recipe.freeze_last)
    if SCORES in state.extra:
        remember(state, said)
    momentum = float(state.schedule.momentum[state.step])
    ema_update_with_buffers(state.teacher, state.student, momentum)
    if recipe.average == "all":
        update_weight_mean(state)
    check_collapse(state, losses)
    state.step += 1
    return losses | {"momentum": momentum}


def update_weight_mean(state: State) -> None:
    """The student's mean over the last fifth of the steps (Izmailov et al. 2018), carried along in the state."""
    count = state.step - (state.schedule.steps - max(1, state.schedule.steps // LAST))
    if count >= 0:
        now = {MEAN + name: value.clone() for name, value in state.student.state_dict().items()}
        before = now if count == 0 else {name: state.extra[name] for name in now}
        state.extra |= running_mean(before, now, count)


def pop_weight_mean(state: State) -> Weights:
    """The mean that `keep_mean` left; the state carries it no longer."""
    return {name.removeprefix(MEAN): state.extra.pop(name) for name in [*state.extra] if name.startswith(MEAN)}


def supervised(balance: Balance) -> Objective:
    """label_weight L_label on the noised view."""

    def objective(state: State, batch: Batch, part: slice) -> Terms:
        assert batch.labels is not None
        views = batch.views(part)
        with autocast(state, views[0]):
            logits = in_float32(state.student.classify(views[1]))
        cost = label_loss(logits, batch.labels[part], batch.known, **balance)
        return Terms(state.recipe.label_weight * cost, {"labels": cost})

    return objective


def look_ahead(state: State, batch: Batch) -> WholeBatchRows:
    """What the parts of a batch need of the whole of it (see `learner.objectives.batchwise`); nothing where one pass has all images."""
    recipe, pieces = state.recipe, parts(batch.size, state.micro)
    balanced = recipe.centring == "sinkhorn"
    if (distributed.world_size() == 1 and len(pieces) == 1) or not (recipe.koleo or balanced):
        return {}
    rows: dict[str, list[Tensor]] = {"dino": [], "ibot": [], "koleo": []}
    state.student.eval()  # nothing is drawn, no statistic moves
    for part in pieces:
        views = batch.views(part)
        assert batch.index is not None
        mask = masks(state, batch.index[part], views[0]) if recipe.ibot else None
        with torch.no_grad(), autocast(state, views[0]):
            seen, patches = look(state.teacher, views[:2], None, mask)
            rows["dino"].append(in_float32(state.teacher.head(seen)))
            rows["ibot"] += [] if patches is None else [in_float32(patches)]
            first = look(state.student, views[: 1 if mask is None else 2], mask, mask)[0]
            rows["koleo"].append(in_float32(first[: len(views[0])]))
    state.student.train()  # also where memory ran out above: the step that is taken again comes by here
    like = next(state.student.parameters())
    width, spread = (
        {"dino": recipe.prototypes, "ibot": recipe.prototypes, "koleo": state.student.backbone.dim},
        koleo_gradient,
    )
    wanted = {"koleo": spread} if recipe.koleo else {}
    if balanced:
        wanted |= dict.fromkeys(
            ["dino"] * bool(recipe.lam) + ["ibot"] * bool(recipe.ibot),
            partial(sinkhorn, temperature=recipe.teacher_temp),
        )
    return {
        name: dict(
            zip((part.start for part in pieces), over_whole_batch(rows[name], width[name], make, like), strict=True)
        )
        for name, make in wanted.items()
    }


def unsupervised(table: dict[str, Tensor], ahead: WholeBatchRows, said: list[Tensor]) -> Objective:
    """lam L_dino + ibot L_ibot + koleo L_koleo + pseudo_weight w(t) L_pseudo + replay L_champion."""

    def objective(state: State, batch: Batch, part: slice) -> Terms:
        recipe, share = state.recipe, share_of(batch, part)
        time = state.step / max(1, state.schedule.steps)
        own = 0.5 if time > LATE else 1.0
        views, index = batch.views(part), batch.index
        assert index is not None
        samples = views[0].shape[0]
        alone = not (recipe.lam or recipe.ibot or recipe.koleo)  # answers only: no view is looked at for nothing
        mask = masks(state, index[part], views[0]) if recipe.ibot else None
        with autocast(state, views[0]):
            with torch.no_grad():
                taught, taught_patches = look(state.teacher, views[: 1 if alone else 2], None, mask)
                teacher_class = in_float32(state.teacher.cls_head(taught[:samples]))
            seen, patches = look(state.student, views[1:2] if alone else views, mask, mask)
            classes = in_float32(state.student.cls_head(seen if alone else seen[samples : 2 * samples]))
            terms = Terms(classes.sum() * 0.0, embeddings=taught[:samples])

            def balanced(name: str, rows: Tensor) -> Tensor | None:
                if recipe.centring == "centre":
                    return None
                return ahead[name][part.start] if name in ahead else sinkhorn(rows, recipe.teacher_temp)

            add = lambda name, weight, cost: _add(terms, name, weight, cost * share)  # noqa: E731
            if recipe.lam:
                with torch.no_grad():
                    teacher_head = in_float32(state.teacher.head(taught))
                answer = balanced("dino", teacher_head)
                guess = in_float32(state.student.head(seen))
                add("dino", own * recipe.lam, state.centres["dino"](guess, teacher_head, assigned=answer))
                terms.centre_rows["dino"] = teacher_head
            if mask is not None:
                assert patches is not None and taught_patches is not None
                there = in_float32(taught_patches)
                cost = state.centres["ibot"](in_float32(patches), there, mask, assigned=balanced("ibot", there))
                add("ibot", own * recipe.ibot, cost)
                terms.centre_rows["ibot"] = there
            if recipe.koleo:
                first = in_float32(seen[:samples])
                near = ahead.get("koleo")
                add(
                    "koleo",
                    own * recipe.koleo,
                    koleo_from_gradient(first, near[part.start], share) if near else koleo(first),
                )
        if recipe.align:
            terms.centre_rows["answer"] = teacher_class.sigmoid()
        if recipe.targets != "none":
            soft, weight = answers(state, table, index[part], teacher_class)
            if SCORES in state.extra:
                said.append(torch.cat([index[part, None].to(teacher_class).double(), teacher_class.double()], 1))
            each = F.binary_cross_entropy_with_logits(classes, soft.nan_to_num(0.5), reduction="none")
            add("pseudo", recipe.pseudo_weight * ramp_up(time / RAMP), (each * weight).sum() / each.numel())
        if recipe.replay and "champion" in table:
            add("replay", recipe.replay, bernoulli_kl(classes, table["champion"][index[part]], recipe.kd_temperature))
        return terms

    return objective


def _add(terms: Terms, name: str, weight: float, cost: Tensor) -> None:
    terms.loss = terms.loss + weight * cost
    terms.logged[name] = cost


def answers(state: State, table: dict[str, Tensor], index: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Soft targets (B, F) and their weights: from the table, else the teacher's, aligned when the recipe says so."""
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


def remember(state: State, said: list[Tensor]) -> None:
    """The teacher's logits of this step's images, of all ranks, take the place of their earlier ones."""
    findings = state.extra[SCORES].shape[1]
    rows, _ = distributed.gather_rows(
        torch.cat([state.extra[SCORES].new_empty(0, 1 + findings, dtype=torch.float64), *said])
    )
    state.extra[SCORES][rows[:, 0].long()] = rows[:, 1:].to(state.extra[SCORES])


def look(
    network: Network, views: list[Tensor], blank: Tensor | None, wanted: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Embeddings of all views, view-major, and patch logits (M, K) at `wanted` of the first two; `blank` hides patches.

    blank, wanted: bool (2 B, h, w).
    """
    if wanted is None:
        return network.encode(views), None
    backbone = cast(Backbone, network.backbone)
    assert network.patch_head is not None
    tokens = backbone.tokens(torch.cat(views[:2]), blank, network.mask)
    seen = [backbone.embedding(tokens)] + ([network.encode(views[2:])] if len(views) > 2 else [])
    patches = tokens[:, -wanted[0].numel() :][wanted.flatten(1)]
    return torch.cat(seen), network.patch_head(patches)


def masks(state: State, index: Tensor, view: Tensor) -> Tensor:
    """Bool (2 B, h, w) for the two global views of these images, from their own numbers at this step."""
    backbone = cast(Backbone, state.student.backbone)
    patches = (
        view.shape[1] - backbone.vit.num_prefix_tokens if view.ndim == 3 else (view.shape[-1] // backbone.patch) ** 2
    )
    place = [state.recipe.seed, 77, state.step]
    numbers = [np.random.default_rng([*place, int(i)]).random((2, MASK_NUMBERS), dtype=np.float32) for i in index]
    drawn = torch.from_numpy(np.stack(numbers, 1)).flatten(0, 1)
    return block_masks(drawn, int(patches**0.5)).to(view.device)
