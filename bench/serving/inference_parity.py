"""What int8 costs a trained network on real images: AUC, probabilities, decisions, beside the same network in fp32.

Makes the network as a first round does before it fine-tunes: pretrained backbone, class head fitted in closed form on
labelled images, calibrated and exported by `learner.training.export`. Images are Kermany's train images (`DIR/kermany224`), divided
by patient; the test is scored once and chooses nothing. Every step is kept in a work folder: killed, it goes on from
there. Knows nothing of speed.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from bench.learning.evolution_images import Pool, divide, to_plate
from deploy.server import runtime
from learner.data.plates import label_table, read_plates
from learner.evaluation import pixel_baseline
from learner.evaluation.auc import auc, interval
from learner.evaluation.model_choice import macro_curve
from learner.evaluation.verdict import Rules
from learner.networks.backbone import build, open_backbone
from learner.networks.heads import ClassHead, Network
from learner.objectives import logistic
from learner.recipes.evolve import FEW_PENALTY, set_head
from learner.round.manifest import RoundManifest, Sample
from learner.round.recipe import resolve
from learner.training.export import ServedModel, calibrate, check_parity, export_onnx, open_session

IMAGES = {"train": 400, "calibration": 120, "test": 600}  # a few minutes of one core
SIDE = 140  # pixels, as in bench/learning/evolution.py: 224 takes three times as long
# The rule, set before anything was measured: int8 is as good where the lower end of the paired 95 % interval of its AUC
# less that of fp32, errors clustered by patient, lies above -MARGIN: a quarter of what the gate grants a whole round.
MARGIN = 0.005
ALPHA = 0.025  # at each end
PART = 16  # images in one pass
CHECKED = 8  # images on which torch and onnxruntime are compared


@dataclass(frozen=True)
class Trained:
    """A trained network as a site gets it, and images it has never seen."""

    graph: Path
    threshold: float  # of the probability, chosen on calibration images
    exported: float  # largest difference in probability between torch and onnxruntime
    images: list[Sample]
    pixel_baseline: np.ndarray  # float [images, 1]: what a logistic regression on 24 x 24 raw pixels says of them


def quantised(model: Path, target: Path) -> Path:
    """Weights of the encoder's matrix products in int8, activations quantised while it runs; the head (Gemm) as it was."""
    plain = onnx.load(model)
    del plain.graph.value_info[
        :
    ]  # shapes noted by the exporter, which the quantiser takes for those of its own tensors
    tables = {table.name: table for table in plain.graph.initializer}
    for node in plain.graph.node:
        if node.op_type == "Gemm":  # the quantiser turns its table in place, also under whoever else uses it
            own = plain.graph.initializer.add()
            own.CopyFrom(tables[node.input[1]])
            own.name = node.input[1] = f"{node.name} table"
    quantize_dynamic(plain, target, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, per_channel=True)
    return target


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` gives, or gave an earlier run."""
    if not path.exists():
        whole = path.with_suffix(".part.npy")
        np.save(whole, make())
        whole.replace(path)
    return np.load(path)


def by_parts(images: list[Sample], work: Path, name: str, say: Callable[[Tensor], np.ndarray]) -> np.ndarray:
    """`say` of the images' plates (n, 512, 512), PART images at a time, each part kept."""
    parts = [images[i : i + PART] for i in range(0, len(images), PART)]
    return np.concatenate(
        [kept(work / f"{name}-{n}.npy", lambda part=part: say(read_plates(part))) for n, part in enumerate(parts)]
    )


def read_images(data: Path, work: Path, seed: int) -> dict[str, list[Sample]]:
    """Images by range (IMAGES says how many), no patient in two ranges; their plates lie in `work`."""
    folder = data / "kermany224"
    with (folder / "manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    truth = np.array([int(row["labels"] != "No Finding") for row in rows])
    images = tuple(
        Sample(n, row["patient_id"], work / f"{n}.npy", "train", (int(truth[n]),)) for n, row in enumerate(rows)
    )
    pool = Pool(images, truth, np.full(len(rows), "kermany-train"))
    wanted = IMAGES["train"], IMAGES["calibration"]
    first, second, (rest,) = divide(pool, np.arange(len(rows)), wanted, seed, 1)
    places = {"train": first, "calibration": second, "test": rest[: IMAGES["test"]]}
    for n in np.concatenate(list(places.values())):
        kept(images[n].plate, lambda picture=folder / rows[n]["file"]: to_plate(picture))
    return {range_: [replace(images[n], range=range_) for n in some] for range_, some in places.items()}


def train(data: Path, backbone: Path, work: Path, seed: int = 0) -> Trained:
    """A network of the recipe `evolve` on this backbone, its graph in `work`."""
    images = read_images(data, work, seed)
    recipe = resolve("evolve", "gpu", {"backbone": str(backbone), "image_size": SIDE})
    plan, weights = open_backbone(recipe)
    net = build(plan, recipe.pos_embed, recipe.pool)
    net.load(weights or {})
    network = Network(net, nn.Identity(), ClassHead(net.dim, 1, recipe.class_hidden))
    served = ServedModel(network, plan, recipe).eval()
    labels = label_table(images["train"])
    seen = by_parts(images["train"], work, "train", lambda plates: run_torch(served, plates))
    set_head(network, logistic.fit(torch.from_numpy(seen), labels, FEW_PENALTY))
    everything = tuple(image for some in images.values() for image in some)
    round_ = RoundManifest(work, "parity", ("abnormal",), recipe, None, None, None, everything, "parity")
    temperature, threshold = kept(work / "point.npy", lambda: operating_point(served, round_))
    served.temperatures[0] = temperature
    graph, part = work / "model.onnx", work / "part.onnx"
    if not graph.exists():
        export_onnx(served, part)
        part.replace(graph)
    exported = kept(work / "exported.npy", lambda: export_error(served, graph, images["test"][:CHECKED]))
    plain = pixel_baseline.fit(thumbnails(images["train"]), labels.numpy()).scores(thumbnails(images["test"]))
    return Trained(graph, float(threshold), float(exported), images["test"], plain)


@torch.inference_mode()
def run_torch(served: ServedModel, plates: Tensor) -> np.ndarray:
    """Embeddings float [n, D]."""
    return served(plates)[1].numpy()


def operating_point(served: ServedModel, round_: RoundManifest) -> np.ndarray:
    """Temperature and threshold from the calibration images, as the export fits them."""
    point = calibrate(served, round_)["abnormal"]
    return np.array([point["temperature"], point["threshold"]])


def export_error(served: ServedModel, graph: Path, images: list[Sample]) -> np.ndarray:
    """Largest difference in probability between torch and onnxruntime; above the export's own limit it raises."""
    found = check_parity(served, open_session(graph), images)
    return np.array(max(found["1"], found["8"]))


def thumbnails(images: list[Sample]) -> np.ndarray:
    """float [images, 576]: raw pixels."""
    return np.concatenate([pixel_baseline.thumbnails(np.load(image.plate)[None]) for image in images])


def logits(graph: Path, images: list[Sample], threads: int, work: Path) -> np.ndarray:
    """float [images, 1], from the graph as the inference server runs it."""
    session = runtime.load(graph.read_bytes(), "cpu", threads)
    return by_parts(images, work, graph.stem, lambda plates: runtime.run(session, plates.numpy())[0])


def compare(trained: Trained, plain: np.ndarray, small: np.ndarray) -> dict:
    """fp32's logits [images, 1] beside int8's: what the table shows. SystemExit where the images can't say."""
    labels = label_table(trained.images).numpy()
    patients = [image.patient for image in trained.images]
    old, new = macro_curve(plain, labels, patients), macro_curve(small, labels, patients)
    if old is None or new is None:
        raise SystemExit(f"parity: {len(labels)} test images have too few of one class")
    low, high = interval(new, old, ALPHA)
    p, q = (1 / (1 + np.exp(-z.astype(float))) for z in (plain, small))
    largest, limit = float(np.abs(p - q).max()), Rules().parity_limit
    return {
        "images": len(labels), "patients": len(set(patients)), "with_finding": int(labels.sum()), "pixels": SIDE,
        "auc": {
            "raw_pixels": round(auc(trained.floor[:, 0], labels[:, 0]), 5),
            "fp32": round(old.value, 5), "int8": round(new.value, 5),
        },
        "difference": round(new.value - old.value, 5), "interval": [round(low, 5), round(high, 5)],
        "margin": MARGIN, "kept": bool(low > -MARGIN),
        "largest_difference": round(largest, 5), "mean_difference": round(float(np.abs(p - q).mean()), 5),
        "gate_limit": limit, "within_gate_limit": largest <= limit, "torch_to_fp32": trained.exported,
        "threshold": round(trained.threshold, 4),
        "decisions_flipped": int(((p >= trained.threshold) != (q >= trained.threshold)).sum()),
    }  # fmt: skip


def measure(data: Path, backbone: Path, work: Path, threads: int) -> dict:
    """One network trained and compared."""
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    trained = train(data, backbone, work)
    small = quantised(trained.graph, work / "int8.onnx")
    plain = logits(trained.graph, trained.images, threads, work)
    return compare(trained, plain, logits(small, trained.images, threads, work))


def show(found: dict) -> None:
    """The table."""
    area, (low, high) = found["auc"], found["interval"]
    print(f"trained, {found['images']} images of {found['patients']} patients it has never seen, {found['pixels']} px")
    print(f"  AUC: raw pixels {area['raw_pixels']:.4f}, fp32 {area['fp32']:.4f}, int8 {area['int8']:.4f}")
    print(f"  int8 - fp32 {found['difference']:+.4f} [{low:+.4f}, {high:+.4f}] (95 %, by patient)")
    print(f"  rule, lower end > {-found['margin']:g}:", "kept" if found["kept"] else "missed")
    print(f"  decisions that flip at {found['threshold']:.3f}: {found['decisions_flipped']}")
    within = "within" if found["within_gate_limit"] else "beyond"
    print(f"  largest |dp| {found['largest_difference']:.4f}, {within} the gate's {found['gate_limit']:g}")
