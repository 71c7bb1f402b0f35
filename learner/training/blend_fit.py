"""Fit the blend of a round: simple features from the site's own images, heads on labels and pseudo-labels, shares."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cxrloop.plate import PLATE_SHAPE
from learner.data.plates import label_table, read_plates
from learner.fits.blend_shares import MOST, SLOPE, fit_shares, held_out_logits, standardised
from learner.fits.logistic import inverse_spread
from learner.fits.patch_dictionary import learn_patches
from learner.networks.blend import FITTED, Blend, Part, grey_levels
from learner.networks.heads import Network
from learner.networks.pooling import resize_matrix
from learner.networks.simple_features import SIDES, Patches, Pixels
from learner.round.manifest import Sample
from learner.training.head_fit import fit_labels_and_pseudo_labels, label_weights
from learner.training.run import Run

LEARNT_FROM = 2000  # images that the patches are learnt from; more change the centroids little
FITTED_TO = 4096  # train images that the heads are fitted to, the labelled ones first: it bounds the memory
AT_ONCE = 4  # plates at once: their responses stay in the processor's cache, three times as fast as 64
# prior shares of the network and of each simple part: a pretrained network tells more than the patches, a random one less
PRIORS = {
    True: {"network": 2.0, "pixels": 0.5, "patches64": 1.0, "patches256": 1.0},
    False: {"network": 0.25, "pixels": 1.0, "patches64": 1.0, "patches256": 1.0},
}


@dataclass(frozen=True)
class SimpleTable:
    """Simple features of train images: `features` (N, D) by name, learnt by the modules of the same names."""

    samples: tuple[Sample, ...]
    modules: Mapping[str, Pixels | Patches]
    features: Mapping[str, Tensor]


def simple_table(run: Run) -> SimpleTable:
    """Return the simple features of the round's train images; the patches are learnt once in a round."""
    samples = chosen_samples(run.manifest.labelled, run.manifest.unlabelled, run.recipe.seed)
    saved = run.compute_once("patches", lambda: _learn(run, samples))
    modules: dict[str, Pixels | Patches] = {"pixels": Pixels()}
    for size in SIDES:
        modules[f"patches{size}"] = Patches(size, *(saved[f"{size}.{key}"].cpu() for key in FITTED))
    return SimpleTable(samples, modules, features_of(run, modules, samples))


def chosen_samples(labelled: Sequence[Sample], unlabelled: Sequence[Sample], seed: int) -> tuple[Sample, ...]:
    """Return at most FITTED_TO train images: the labelled ones first, then a random choice of the others."""
    first = list(labelled)[:FITTED_TO]
    known = {sample.image for sample in first}
    others = [sample for sample in unlabelled if sample.image not in known]
    order = np.random.default_rng([seed, 13]).permutation(len(others))[: FITTED_TO - len(first)]
    return (*first, *(others[i] for i in sorted(order)))


def _learn(run: Run, samples: Sequence[Sample]) -> dict[str, Tensor]:
    order = np.random.default_rng([run.recipe.seed, 14]).permutation(len(samples))[:LEARNT_FROM]
    chosen, images = [samples[i] for i in sorted(order)], {size: [] for size in SIDES}
    matrices = {size: resize_matrix(PLATE_SHAPE[0], size) for size in SIDES}
    for grey in _grey(run, chosen):
        for size, matrix in matrices.items():
            images[size].append(matrix @ grey @ matrix.T)
    learnt = {size: learn_patches(torch.cat(parts), run.recipe.seed) for size, parts in images.items()}
    return {f"{size}.{key}": getattr(patches, key) for size, patches in learnt.items() for key in FITTED}


def _grey(run: Run, samples: Sequence[Sample]) -> Iterator[Tensor]:
    for low in range(0, len(samples), AT_ONCE):
        yield grey_levels(read_plates(samples[low : low + AT_ONCE]))
        run.progress.raise_if_paused()


@torch.no_grad()
def features_of(run: Run, modules: Mapping[str, nn.Module], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return the simple features (N, D) of samples, by name."""
    rows: dict[str, list[Tensor]] = {name: [] for name in modules}
    for grey in _grey(run, samples):
        for name, module in modules.items():
            rows[name].append(module(grey))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def fit_blend(run: Run, network: Network, table: SimpleTable, pseudo: Mapping[int, Tensor] | None = None) -> Blend:
    """Return the blend of a network, whose class head stays, with heads fitted to the simple features.

    pseudo: soft targets (F,) by image, for images without label; None = fit to the labels alone.
    """
    labels = label_table(table.samples)
    weights = label_weights(run, labels)
    at = [i for i, sample in enumerate(table.samples) if sample.labelled]
    heads = {
        name: standardised(fit_labels_and_pseudo_labels(part, table.samples, pseudo, weights), part)
        for name, part in table.features.items()
    }
    embeddings = run.embeddings(network, table.samples)
    shares, bias = _shares(run, embeddings, table, labels, at)
    own = network_head_logits(network, embeddings)
    scale, level = shares[0] * inverse_spread(own), own.mean(0)
    parts = {}
    for share, (name, head) in zip(shares[1:], heads.items(), strict=True):
        parts[name] = Part(table.modules[name], share * head.weight, table.features[name].mean(0))
    return Blend(scale, bias - scale * level, parts)


def network_head_logits(network: Network, embeddings: Tensor) -> Tensor:
    """Return the class logits (N, F) of embeddings (N, D), float64 in host memory."""
    device = next(network.parameters()).device
    with torch.no_grad():
        return network.cls_head(embeddings.to(device)).double().cpu()


def _shares(run: Run, embeddings: Tensor, table: SimpleTable, labels: Tensor, at: list[int]) -> tuple[Tensor, Tensor]:
    """Return shares of the network and of the simple parts, and the bias, from labelled images held out in turn."""
    rows = at[:MOST]
    prior = PRIORS[run.recipe.backbone != "random"]
    wanted = torch.tensor([prior["network"], *(prior[name] for name in table.features)], dtype=torch.float64)
    parts = [embeddings[rows], *(part[rows] for part in table.features.values())]
    patients = [table.samples[i].patient for i in rows]
    if len(set(patients)) < 2:
        return SLOPE * wanted / wanted.sum(), torch.zeros(labels.shape[1], dtype=torch.float64)
    return fit_shares(held_out_logits(parts, labels[rows], patients, run.recipe.seed), labels[rows], wanted)


@torch.no_grad()
def blend_logits(run: Run, blend: Blend, network_logits: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Return the blend's logits (N, F) of samples from the network's (N, F)."""
    low, rows = 0, []
    for grey in _grey(run, samples):
        rows.append(blend(grey, network_logits[low : low + len(grey)].float()))
        low += len(grey)
    return torch.cat(rows)
