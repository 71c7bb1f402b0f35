"""The linear class head of a round: fitted in closed form to labels, to a graph, or to pseudo-labels."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from learner.data.plates import label_table
from learner.engine.step import State
from learner.fits import logistic
from learner.fits.head_refit import FEW_PENALTY, blend_heads, combine_by_finding, fit_graph_and_labels
from learner.fits.label_propagation import has_both_classes
from learner.fits.shared_heads import fit_heads
from learner.networks.heads import Network
from learner.objectives.class_losses import weight_table
from learner.round.manifest import Sample
from learner.training.run import Run
from learner.training.supervised import label_balance

PSEUDO_WEIGHT = 0.3  # of a pseudo-label beside a label
LABELS_SHARE = 0.5  # share of the head fitted to labels in the mean with the one fitted to pseudo-labels too


def fit_head(run: Run, network: Network) -> None:
    """Fit a linear class head to the labelled images by logistic regression on the network's embeddings.

    With a blend, findings learn from each other (`learner.fits.shared_heads`).
    """
    if run.recipe.class_hidden == 0:
        samples, labels = run.manifest.labelled, label_table(run.manifest.labelled)
        features, weights = run.embeddings(network, samples), label_weights(run, labels)
        blended = run.recipe.blend
        set_head(
            network,
            fit_heads(features, labels, weights) if blended else logistic.fit(features, labels, FEW_PENALTY, weights),
        )


def start_with_fitted_head(run: Run, state: State) -> None:
    """Load the backbone and fit the class head on its features before any fine-tuning (LP-FT, Kumar et al., ICLR 2022)."""
    run.from_backbone(state)
    fit_head(run, state.student)
    state.teacher.load_state_dict(state.student.state_dict())


def refit(run: Run, network: Network, trained_share: float = 0.0, table: Mapping[str, Tensor] | None = None) -> None:
    """Refit the class head on the network's embeddings as the recipe's `refit`: to labels, also with graph or pseudo-labels.

    trained_share: share of the trained head in the mean with the fitted one; table: soft targets for "pseudo". In later
    rounds, a finding without labels of both classes keeps its head.
    """
    recipe, samples = run.recipe, run.manifest.unlabelled
    if recipe.refit == "none" or recipe.class_hidden or not run.manifest.labelled:
        return
    before, labels = head_of(network), label_table(samples)
    if recipe.refit == "linear":
        fit_head(run, network)
    else:
        features, weights = run.embeddings(network, samples), label_weights(run, labels)
        if recipe.refit == "pseudo":
            pseudo = pseudo_by_image(run, table) if table else None
            fitted = fit_labels_and_pseudo_labels(features, samples, pseudo, weights)
        else:
            fitted = fit_graph_and_labels(features, labels, recipe.neighbours, recipe.components, weights)
        set_head(network, blend_heads(fitted, before, features, trained_share) if trained_share else fitted)
    if not run.is_first_round:
        set_head(network, combine_by_finding(has_both_classes(labels), head_of(network), before))


def fit_labels_and_pseudo_labels(
    features: Tensor, samples: Sequence[Sample], pseudo: Mapping[int, Tensor] | None, weights: Tensor | None = None
) -> logistic.LinearHead:
    """Return the mean of a head fitted to labels and one fitted to labels and pseudo-labels; features (N, D) of samples.

    Pseudo-labels carry the teacher's errors on; the head fitted to labels alone holds the mean back where they are many.
    weights: of the labels (N, F), None = 1. Without pseudo-labels it is the head fitted to labels.
    """
    labels = label_table(samples)
    by_labels = fit_heads(features, *with_pseudo_labels(samples, None, weights))
    if pseudo is None:
        return by_labels
    targets, own = with_pseudo_labels(samples, pseudo, weights)
    known = (labels.nan_to_num(0.0) * own).sum(0)
    return blend_heads(fit_heads(features, targets, own, positives=known), by_labels, features, LABELS_SHARE)


def pseudo_by_image(run: Run, table: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Return the table's soft targets (F,) by image, in host memory."""
    rows = zip(run.manifest.unlabelled, table["soft"].cpu(), strict=True)
    return {sample.image: soft for sample, soft in rows}


def with_pseudo_labels(
    samples: Sequence[Sample], pseudo: Mapping[int, Tensor] | None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return targets and weights, (N, F) each: labels where they are known, else pseudo-labels at PSEUDO_WEIGHT.

    weights: of the labels (N, F), None = 1. A finding without label and pseudo-label (nan) of an image has weight 0.
    """
    labels = label_table(samples)
    own = torch.ones_like(labels).double() if weights is None else weights.double()
    if pseudo is None:
        return labels, own * ~labels.isnan()
    unknown = torch.full_like(labels[0], float("nan"))
    soft = torch.stack([pseudo.get(sample.image, unknown) for sample in samples]).to(labels)
    targets = torch.where(labels.isnan(), soft, labels)
    return targets, torch.where(labels.isnan(), PSEUDO_WEIGHT, own) * ~targets.isnan()


def label_weights(run: Run, labels: Tensor) -> Tensor | None:
    """Return the weights (N, F) of labels (N, F) by the recipe's `balance`; None = equal."""
    weights = weight_table(labels.to(run.device), label_balance(run))
    return None if weights is None else weights.cpu()


def head_of(network: Network) -> logistic.LinearHead:
    """Return the network's linear class head, float64 in host memory."""
    layer = cast(nn.Linear, network.cls_head.mlp[-1])
    return logistic.LinearHead(layer.weight.detach().double().cpu(), layer.bias.detach().double().cpu())


def set_head(network: Network, head: logistic.LinearHead) -> None:
    """Set the network's linear class head."""
    layer = cast(nn.Linear, network.cls_head.mlp[-1])
    with torch.no_grad():
        layer.weight.copy_(head.weight)
        layer.bias.copy_(head.bias)


def logits_of(run: Run, network: Network, samples: Sequence[Sample]) -> Tensor:
    """Return class logits (N, F) of unaugmented images, float32 in host memory."""
    return network.cls_head(run.embeddings(network, samples).to(run.device)).float().detach().cpu()
