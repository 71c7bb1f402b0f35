"""Which features and which fit need the fewest labels: the study behind the default recipe.

    python bench/adults/features_study.py --data DIR --backbone FILE --work DIR [--labels 40 80 160] [--draws 16]

Adults, six findings (experiment D's images). The heads are fitted to a draw of labelled images and scored on the other
patients outside experiment D's test, which stays untouched: these figures chose the defaults. Uses the token bank of
bench/adults/experiment.py in the same work folder.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's learner, whichever is installed

from bench.adults.experiment import SIZES, open_bank
from bench.adults.images import FINDINGS, Adults, divide, read_adults
from bench.common import machine, results
from learner.data.plates import read_plates
from learner.data.token_bank import TokenBank
from learner.evaluation.auc import auc
from learner.fits import logistic
from learner.fits.blend_shares import fit_shares, held_out_logits, standardised
from learner.fits.label_propagation import pseudo_labels
from learner.fits.patch_dictionary import learn_patches
from learner.fits.shared_heads import fit_heads
from learner.networks.backbone import build
from learner.networks.blend import grey_levels
from learner.networks.pooling import pool_tokens, resize_matrix
from learner.networks.simple_features import STRIDES, Pixels
from learner.networks.vit import Backbone
from learner.objectives.pseudo_targets import shrunk_prevalence
from learner.pretrained.reader import open_backbone
from learner.round.recipe import Recipe, resolve
from learner.training.blend_fit import AT_ONCE, PRIORS

LOWER = "lower blocks, cells"
OTHERS = {512: 24}  # a further image side in pixels, with its stride, for comparison
LAST_PENALTIES = (0.1, 0.3, 1.0)  # of the head on the last block; the best one is shown, so the row is flattered


def main() -> None:
    """Compute the features once, run all rows, print and write the table."""
    parser = results.parser(__doc__, "features_study.json")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--labels", type=int, nargs="*", default=[40, 80, 160])
    parser.add_argument("--draws", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    adults = read_adults(options.data, options.work, mednist=False)
    recipe = resolve("evolve", "cpu", {**SIZES, "backbone": str(options.backbone)})
    bank = open_bank(adults, recipe, options.work / "bank-lower")
    features = {**network_features(adults, recipe, bank), **simple_features(adults)}
    tables = {}
    for labels in options.labels:
        tables[labels] = study(adults, features, labels, options.draws)
        show(labels, tables[labels])
    facts = {"made_at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine.facts()}
    results.write(options.out, {**facts, "draws": options.draws, "findings": FINDINGS, "tables": tables})


@torch.no_grad()
def network_features(adults: Adults, recipe: Recipe, bank: TokenBank) -> dict[str, Tensor]:
    """Return embeddings (N, D) of the pretrained network: lower blocks with two pools, and the last block."""
    opened = open_backbone(recipe)
    network = build(opened.plan, recipe.pos_embed)
    assert isinstance(network, Backbone) and opened.tensors
    network.load(opened.tensors)
    network.eval()
    blocks, prefix = list(network.vit.blocks), network.vit.num_prefix_tokens
    kept = round(len(blocks) * 2 / 3)
    rows: dict[str, list[Tensor]] = {
        LOWER: [],
        "lower blocks, mean of the patches": [],
        "last block, class token and mean": [],
    }
    for low in range(0, len(adults.samples), 32):
        tokens = network.run(blocks[kept - 1 : kept], bank.unaugmented(adults.samples[low : low + 32]))
        normed = network.vit.norm(tokens)
        rows[LOWER].append(pool_tokens(normed, "grid", prefix))
        rows["lower blocks, mean of the patches"].append(pool_tokens(normed, "mean", prefix))
        last = network.vit.norm(network.run(blocks[kept:], tokens))
        rows["last block, class token and mean"].append(pool_tokens(last, "both", prefix))
    return {name: torch.cat(parts) for name, parts in rows.items()}


@torch.no_grad()
def simple_features(adults: Adults) -> dict[str, Tensor]:
    """Return pixels and patch features (N, D) of all images; the patches are learnt from all but the test images."""
    grey = [grey_levels(read_plates(adults.samples[low : low + 64])) for low in range(0, len(adults.samples), 64)]
    test = set(divide(adults, 80, 0).test.tolist())
    own = torch.tensor([i for i in range(len(adults.samples)) if i not in test])
    found = {"pixels": torch.cat([Pixels()(part) for part in grey])}
    STRIDES.update(OTHERS)
    for size in STRIDES:
        matrix = resize_matrix(grey[0].shape[-1], size)
        patches = learn_patches(torch.cat([matrix @ part @ matrix.T for part in grey])[own], seed=0)
        found[f"patches{size}"] = torch.cat([patches(few) for part in grey for few in part.split(AT_ONCE)])
    return found


def study(adults: Adults, features: dict[str, Tensor], labels: int, draws: int) -> dict[str, dict]:
    """Return mean and standard deviation over draws of macro AUC and of each finding's AUC, by row."""
    rows: dict[str, list[list[float]]] = {}
    for seed in range(draws):
        division = divide(adults, labels, seed)
        others = np.concatenate([division.validation, *division.rounds])
        for name, logits in answers(adults, features, division.labelled, others, seed).items():
            rows.setdefault(name, []).append(aucs(adults, logits, others))
    return {name: summary(np.array(values)) for name, values in rows.items()}


def answers(
    adults: Adults, features: dict[str, Tensor], labelled: np.ndarray, others: np.ndarray, seed: int
) -> dict[str, Tensor]:
    """Return the logits (N, F) of all images by row, from heads fitted to the labelled images of one draw."""
    known = torch.full((len(adults.samples), len(FINDINGS)), float("nan"))
    known[labelled] = torch.from_numpy(adults.truth[labelled]).float()
    train = torch.from_numpy(np.concatenate([labelled, others]))
    labels = known[train]
    found: dict[str, Tensor] = {}
    for penalty in LAST_PENALTIES:
        last = features["last block, class token and mean"]
        found[f"last block, class token and mean, penalty {penalty:g}"] = logistic.fit(last[train], labels, penalty)(
            last
        )
    parts: dict[bool, dict[str, Tensor]] = {}
    for share in (False, True):
        parts[share] = {}
        for name in (
            LOWER,
            "lower blocks, mean of the patches",
            *(n for n in features if n.startswith(("pix", "pat"))),
        ):
            own = features[name][train]
            parts[share][name] = standardised(fit_heads(own, labels, share=share), own)(features[name])
    found |= {f"{name}": logits for name, logits in parts[False].items()}
    found[f"{LOWER}, shared heads"] = parts[True][LOWER]
    prior = PRIORS[True]
    used = {LOWER: prior["network"]} | {name: prior[name] for name in prior if name != "network"}
    for share, name in ((False, "blend, prior shares, no shared heads"), (True, "blend, prior shares")):
        found[name] = sum(weight * parts[share][part] for part, weight in used.items())
    alone = {name: weight for name, weight in PRIORS[False].items() if name != "network"}
    found["simple features alone (no backbone)"] = sum(weight * parts[True][part] for part, weight in alone.items())
    patients = [adults.samples[i].patient for i in labelled]
    held_out = held_out_logits([features[part][labelled] for part in used], known[labelled], patients, seed)
    wanted = torch.tensor(list(used.values()), dtype=torch.float64)
    for pull, name in ((1.0, "blend, fitted shares (default)"), (0.01, "blend, shares by the labels alone")):
        shares = fit_shares(held_out, known[labelled], wanted, pull)[0]
        found[name] = sum(weight * parts[True][part] for part, weight in zip(used, shares, strict=True))
    seen = features[LOWER][train]
    soft = pseudo_labels(seen, labels, shrunk_prevalence(labels), 10, 32)
    found["lower blocks, neighbours' pseudo-labels"] = fit_heads(seen, soft)(features[LOWER])
    return found


def aucs(adults: Adults, logits: Tensor, others: np.ndarray) -> list[float]:
    """Return the AUC of each finding on images."""
    truth = adults.truth[others].astype(float)
    return [auc(logits[others, i].double().numpy(), truth[:, i]) for i in range(len(FINDINGS))]


def summary(values: np.ndarray) -> dict[str, float]:
    """Return the row of a table from AUCs (draws, F)."""
    macro = values.mean(1)
    named = {"macro": macro.mean(), "macro sd": macro.std(ddof=1), "abnormal sd": values[:, 0].std(ddof=1)}
    named |= dict(zip(FINDINGS, values.mean(0), strict=True)) | {"macro without abnormal": values[:, 1:].mean()}
    return {name: round(float(value), 4) for name, value in named.items()}


def show(labels: int, table: dict[str, dict]) -> None:
    """Print one table."""
    print(f"\n{labels} labelled images" + " " * 34 + "macro   sd   " + "  ".join(f"{f[:9]:>9}" for f in FINDINGS))
    for name, row in table.items():
        print(
            f"{name:50} {row['macro']:.3f} {row['macro sd']:.3f}  " + "  ".join(f"{row[f]:9.3f}" for f in FINDINGS),
            flush=True,
        )


if __name__ == "__main__":
    main()
