"""Agreement of saliency maps with lesions: every method on phantoms, whose lesions have a known place.

    python bench/explain/saliency.py [--images 16] [--networks ...] [--methods ...]

Trains small networks on phantoms (on the CPU, under two minutes each) and draws every map of images with a finding. The
place of a lesion: where the image differs from the same image without it. Columns: pointing game (the map's peak is
within 16 of 512 px of the lesion); share of the map's strength there, and in the lesion's box; rank correlation with
the original map after a reset of the class head, and of all weights (0 = the map depends on them). Two rows show maps
without any network. Phantoms are easy, and their lesions have typical places.
"""

import json
import sys
import time
import warnings
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import results
from dicom.phantom.phantom import Phantom, draw
from dicom.phantom.wrap import wrap
from dicom.pixels.plate import to_plate
from learner.data.augment import normalise, to_image
from learner.errors import LearnerError
from learner.evaluation.calibrate import auc
from learner.explain import saliency, sanity
from learner.networks.architecture import plan_of
from learner.networks.backbone import Backbone
from learner.networks.heads import Network, make_network
from learner.networks.mimetic_init import mimic_trained
from learner.networks.pooling import resize_matrix
from learner.round.recipe import Recipe, resolve

FINDINGS = ("cardiomegaly", "effusion", "opacity")
PREVALENCE, STRENGTH = 0.45, (0.5, 1.3)  # as in `cxrloop demo`
SIDE, NEAR = 512, 16  # px of the plate; the pointing game's usual tolerance is 15
CONTRAST = 0.25  # of the largest change: the limit of the lesion
TESTED, CHECKED = 200, 2  # images for AUC and for the sanity check
BATCH = 16
STEPS = 10  # of each integral under SmoothGrad; ten noisy paths of ten steps are enough
NETWORKS = {  # settings, epochs, peak learning rate
    "transformer, mean of patches": ({"arch": "vit_tiny_patch8_depth2", "image_size": 64, "pool": "mean"}, 10, 5e-4),
    "transformer, class token": ({"arch": "vit_tiny_patch8_depth2", "image_size": 64, "pool": "cls"}, 10, 5e-4),
    "resnet10t": ({"arch": "resnet10t", "image_size": 96}, 3, 1e-3),
}
# closed forms tried for the served heatmap; "smoothed" is the control: a smoother map alone
CANDIDATES = ("share x rollout", "share x last attention", "share smoothed")
ALL = (*saliency.METHODS, *CANDIDATES)


def samples(count: int, seed: int) -> tuple[list[Phantom], torch.Tensor, np.ndarray]:
    """Return phantoms, plates uint8 [N, 512, 512] by the product's own pixel path, labels [N, F]."""
    drawn = draw(count, seed, FINDINGS, PREVALENCE, STRENGTH, repeat=0.15)
    plates = torch.from_numpy(np.stack([to_plate(wrap(p.pixels(), p.patient, p.view)) for p in drawn]))
    return drawn, plates, np.array([[p.labels[f] for f in FINDINGS] for p in drawn], np.float32)


def lesion_place(phantom: Phantom, finding: str) -> tuple[np.ndarray, np.ndarray]:
    """Return two masks, bool [512, 512]: within NEAR px of the lesion, and its box."""
    without = replace(phantom, strengths={k: v for k, v in phantom.strengths.items() if k != finding})
    change = np.abs(phantom.pixels().astype(int) - without.pixels().astype(int))
    lesion = (change > CONTRAST * np.quantile(change, 0.999)).astype(np.uint8) * 255
    picture = Image.fromarray(lesion).filter(ImageFilter.MedianFilter(5))  # single pixels are noise
    large = torch.from_numpy(np.array(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)))[None].float()
    tall = F.max_pool2d(large, (2 * NEAR + 1, 1), 1, (NEAR, 0))
    near = F.max_pool2d(tall, (1, 2 * NEAR + 1), 1, (0, NEAR))[0].numpy() > 0
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    box = np.zeros_like(near)
    box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return near, box


def train(
    keys: dict, epochs: int, peak: float, plates: torch.Tensor, labels: np.ndarray, seed: int
) -> tuple[Network, Recipe]:
    """Train a network on the labels of all plates, with shifts of up to 1/16 of the side against overfitting."""
    recipe = resolve("distl", "demo", {"local_size": 24, "prototypes": 8, "head_hidden": 8, **keys})
    torch.manual_seed(seed)
    network = make_network(plan_of(recipe.arch, recipe.image_size), recipe, len(FINDINGS))
    mimic_trained(network.backbone)
    for layer in network.cls_head.mlp:
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()
    images = to_images(plates, recipe)
    optimiser = torch.optim.AdamW(network.parameters(), lr=peak, weight_decay=0.05)
    sweep = len(images) // BATCH
    steps = epochs * sweep
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, peak, total_steps=steps)
    targets = torch.from_numpy(labels)
    reach, order = recipe.image_size // 16, torch.arange(len(images))
    for step in range(steps):
        if step % sweep == 0:
            order = torch.randperm(len(images))
        chosen = order[(step % sweep) * BATCH :][:BATCH]
        down, right = torch.randint(-reach, reach + 1, (2,)).tolist()
        seen = normalise(images[chosen].roll((down, right), (2, 3)), recipe)
        loss = F.binary_cross_entropy_with_logits(network.classify(seen), targets[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rates.step()
    return network.eval().requires_grad_(False), recipe


def to_images(plates: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return plates uint8 [N, 512, 512] at the recipe's image size, float (N, C, s, s)."""
    matrix = resize_matrix(SIDE, recipe.image_size)
    return torch.cat([to_image(part, matrix) for part in plates.split(64)])


def candidate(network: Network, recipe: Recipe, images: torch.Tensor, finding: int, name: str) -> torch.Tensor:
    """Return a map of one of CANDIDATES, (B, 1, h, w); the exported graph could compute it too."""
    backbone = network.backbone
    if not isinstance(backbone, Backbone):
        raise LearnerError(f"{name}: for transformers")
    seen = normalise(images, recipe)
    with torch.no_grad():
        embedding, trace = backbone.trace(seen)
        share = trace.contributions(network.cls_head.gradient(embedding)[:, finding : finding + 1])
        if name == "share smoothed":
            return F.avg_pool2d(share, 3, 1, 1, count_include_pad=False)
        attentions = [0.5 * attention.mean(1) for attention in backbone.attentions(seen)]
        through = still = torch.eye(attentions[0].shape[1])
        for attention in attentions if name == "share x rollout" else attentions[-1:]:
            through = (attention + 0.5 * still) @ through
        first = backbone.vit.num_prefix_tokens  # follow the content of each patch back to the patches it came from
        return (share.flatten(2) @ through[:, first:, first:]).unflatten(-1, share.shape[2:])


def draw_map(
    network: Network, recipe: Recipe, images: torch.Tensor, finding: int, method: str, steps: int = saliency.STEPS
) -> torch.Tensor:
    """Return a map of any method, signed (B, 1, h, w); attention heads are averaged; `steps` of an integral alone."""
    if method in CANDIDATES:
        return candidate(network, recipe, images, finding, method)
    if "ig" in method.split("-"):  # as `explain` does, without the check of the sum, which fails after resets

        def logit(images: torch.Tensor) -> torch.Tensor:
            return network.classify(normalise(images, recipe))[:, finding]

        base = saliency.blurred(images) if method == "ig-blurred" else torch.zeros_like(images)
        if method != "smoothgrad-ig":
            return saliency.integrated(logit, images, base, steps)
        noise = saliency.draws(images, saliency.DRAWS_IG)
        return saliency.smoothed(lambda noisy: saliency.integrated(logit, noisy, base, STEPS), images, noise)
    return saliency.explain(network, recipe, images, finding, method)[0].mean(1, keepdim=True)


def score(made: np.ndarray, near: np.ndarray, box: np.ndarray) -> tuple[float, float, float]:
    """Return pointing game, share of strength near the lesion, share in its box, of a non-negative map [h, w]."""
    row, column = np.unravel_index(made.argmax(), made.shape)
    step = SIDE / made.shape[0]
    large = np.asarray(Image.fromarray(made.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    total = max(float(large.sum()), 1e-12)
    hit = near[int((row + 0.5) * step), int((column + 0.5) * step)]
    return float(hit), float(large[near].sum()) / total, float(large[box].sum()) / total


def sanity_check(network: Network, recipe: Recipe, images: torch.Tensor, method: str) -> list[tuple[str, float]]:
    """Return the sanity check of a method on a few images."""
    return sanity.cascade(deepcopy(network), lambda net: draw_map(net, recipe, images, 1, method))


def measure(network: Network, recipe: Recipe, test: tuple, per_finding: int, methods: list[str]) -> dict[str, dict]:
    """Return the averages of every method on the first images with each finding; first two maps without a network."""
    phantoms, plates, labels = test
    images = to_images(plates, recipe)
    chosen = [(i, f) for f in range(len(FINDINGS)) for i in np.flatnonzero(labels[:, f])[:per_finding]]
    places = [lesion_place(phantoms[i], FINDINGS[f]) for i, f in chosen]
    usual = [np.mean([near for (_, g), (near, _) in zip(chosen, places, strict=True) if g == f], 0) for f in range(3)]
    flat = [score(np.ones((2, 2)), *where) for where in places]
    table = {
        "(flat map)": averages(
            [(float(near.mean()), *rest) for (near, _), (_, *rest) in zip(places, flat, strict=True)]
        ),
        "(usual place of the finding)": averages(
            [score(usual[f], *where) for (_, f), where in zip(chosen, places, strict=True)]
        ),
    }
    for method in methods:
        began = time.monotonic()
        try:
            maps = [draw_map(network, recipe, images[i : i + 1], f, method) for i, f in chosen]
            checked = sanity_check(network, recipe, images[:CHECKED], method)
        except LearnerError as error:
            table[method] = {"refused": str(error)}
            continue
        for name, positive in ((method, True), (f"{method}, either sign", False)):
            if not positive and method in ("attention", "rollout"):
                continue
            seen = [saliency.shown(made, positive)[0, 0].numpy() for made in maps]
            table[name] = averages([score(shown, *where) for shown, where in zip(seen, places, strict=True)])
            table[name] |= {"head reset": checked[0][1], "all reset": checked[-1][1], "cascade": checked}
        table[method]["seconds a map"] = round((time.monotonic() - began) / len(chosen), 3)
        print(line(method, table[method]), flush=True)
    return table


def averages(rows: list[tuple[float, float, float]]) -> dict[str, float]:
    """Return the means of the rows of `score`."""
    hits, near, box = (float(v) for v in np.mean(rows, 0))
    return {"pointing": hits, "near": near, "box": box, "n": len(rows)}


def line(name: str, row: dict) -> str:
    """Return a row as text."""
    if "refused" in row:
        return f"  {name:34} refused: {row['refused'][:80]}"
    cells = "".join(f"{row[key]:10.2f}" for key in ("pointing", "near", "box"))
    cells += "".join(f"{row[key]:12.2f}" if key in row else f"{'':12}" for key in ("head reset", "all reset"))
    return f"  {name:34}{cells}"


def main() -> None:
    """Train and measure every network; the result file is written after each."""
    parser = results.parser(__doc__, "saliency.json")
    parser.add_argument("--images", type=int, default=16, help="images of each finding")
    parser.add_argument("--train", type=int, default=800, help="training phantoms")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], help="seeds of the networks; the phantoms stay the same"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    _, plates, labels = samples(options.train, 41)
    test = samples(TESTED, 42)
    for name, seed in [(name, seed) for name in options.networks for seed in options.seeds]:
        began = time.monotonic()
        network, recipe = train(*NETWORKS[name], plates, labels, seed)
        seconds = time.monotonic() - began
        with torch.no_grad():
            logits = torch.cat([network.classify(normalise(p, recipe)) for p in to_images(test[1], recipe).split(32)])
        quality = {f: auc(logits[:, i].numpy(), test[2][:, i].astype(float)) for i, f in enumerate(FINDINGS)}
        print(
            f"{name}, seed {seed}: trained in {seconds:.0f} s, AUC "
            + ", ".join(f"{f} {v:.3f}" for f, v in quality.items())
        )
        print(f"  {'':34}{'pointing':>10}{'near':>10}{'box':>10}{'head reset':>12}{'all reset':>12}", flush=True)
        methods = measure(network, recipe, test, options.images, options.methods)
        print("\n".join(line(key, row) for key, row in methods.items()), flush=True)
        record(
            options.out,
            f"{name}, seed {seed}, {options.images} images a finding",
            {
                "made_at": datetime.now(UTC).isoformat(timespec="seconds"), "trained_on": options.train,
                "seconds_of_training": round(seconds, 1), "keys": NETWORKS[name][0], "auc": quality, "methods": methods,
            },
        )  # fmt: skip


def record(path: Path, name: str, result: dict) -> None:
    """Add or replace the result of one network; the others stay, so that the study can run in parts."""
    known = json.loads(path.read_text()) if path.exists() else {}
    results.write(path, known | {name: result})


if __name__ == "__main__":
    main()
