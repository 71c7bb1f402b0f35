"""The loss by int8 of a trained network on real images: AUC, probabilities and decisions, beside the same network in fp32.

The network is that of a first round before fine-tuning: pretrained backbone, class head fitted in closed form on
labelled images, calibrated and exported by `learner.training.export`. Images are Kermany's train images
(`DIR/kermany224`), divided by patient. The test images are scored once and choose nothing. A work folder keeps every
step, so that a killed run resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from bench.common.public_images import read_plate, read_set
from bench.learning.evolution_images import Pool, divide
from deploy import runtime
from learner.data.plates import label_table, read_plates
from learner.evaluation import pixel_baseline
from learner.evaluation.auc import auc, interval
from learner.evaluation.model_choice import macro_curve
from learner.evaluation.verdict import Rules
from learner.fits import logistic
from learner.networks.backbone import build
from learner.networks.heads import ClassHead, Network
from learner.pretrained.reader import open_backbone
from learner.recipes.evolve import FEW_PENALTY
from learner.round.manifest import RoundManifest, Sample
from learner.round.recipe import resolve
from learner.training.export import ServedModel, calibrate, check_parity, export_onnx, open_session
from learner.training.head_fit import set_head

IMAGES = {"train": 400, "calibration": 120, "test": 600}  # a few minutes of one core
SIDE = 140  # pixels, as in bench/learning/evolution.py; 224 takes three times as long
# The rule, set before the measurement: int8 is non-inferior if the lower end of the paired 95 % interval of its AUC
# minus that of fp32, clustered by patient, lies above -MARGIN: a quarter of the gate's margin for a round.
MARGIN = 0.005
ALPHA = 0.025  # at each end
PART = 16  # images in one pass
CHECKED = 8  # images on which torch and onnxruntime are compared


@dataclass(frozen=True)
class Trained:
    """A trained network as a site receives it, and images that it was not trained on."""

    graph: Path
    threshold: float  # of the probability, chosen on calibration images
    exported: float  # largest difference in probability between torch and onnxruntime
    images: list[Sample]
    pixel_baseline: np.ndarray  # float [images, 1]: scores of a logistic regression on 24 x 24 raw pixels


def quantised(model: Path, target: Path) -> Path:
    """Write the graph with int8 weights in the encoder's matrix products; the head (Gemm) stays fp32. Return `target`."""
    plain = onnx.load(model)
    del plain.graph.value_info[:]  # the quantiser would take the exporter's shapes for those of its own tensors
    tables = {table.name: table for table in plain.graph.initializer}
    for node in plain.graph.node:
        if node.op_type == "Gemm":  # the quantiser transposes this table in place, though other nodes use it
            own = plain.graph.initializer.add()
            own.CopyFrom(tables[node.input[1]])
            own.name = node.input[1] = f"{node.name} table"
    quantize_dynamic(plain, target, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, per_channel=True)
    return target


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array of `make`, stored at `path` by this or an earlier run."""
    if not path.exists():
        whole = path.with_suffix(".part.npy")
        np.save(whole, make())
        whole.replace(path)
    return np.load(path)


def by_parts(images: list[Sample], work: Path, name: str, score: Callable[[Tensor], np.ndarray]) -> np.ndarray:
    """Return `score` of the images' plates (n, 512, 512), PART images at a time; each part is stored."""
    parts = [images[i : i + PART] for i in range(0, len(images), PART)]
    return np.concatenate(
        [kept(work / f"{name}-{n}.npy", lambda part=part: score(read_plates(part))) for n, part in enumerate(parts)]
    )


def read_images(data: Path, work: Path, seed: int) -> dict[str, list[Sample]]:
    """Return images by range, as many as IMAGES states, no patient in two ranges; their plates are in `work`."""
    rows = [image for image in read_set(data / "kermany224") if image.split == "train"]
    truth = np.array([image.abnormal for image in rows])
    images = tuple(
        Sample(n, row.patient_id, work / f"{n}.npy", "train", (int(truth[n]),)) for n, row in enumerate(rows)
    )
    pool = Pool(images, truth, np.full(len(rows), "kermany-train"))
    wanted = IMAGES["train"], IMAGES["calibration"]
    first, second, (rest,) = divide(pool, np.arange(len(rows)), wanted, seed, 1)
    places = {"train": first, "calibration": second, "test": rest[: IMAGES["test"]]}
    for n in np.concatenate(list(places.values())):
        kept(images[n].plate, lambda picture=rows[n].picture: read_plate(picture))
    return {range_: [replace(images[n], range=range_) for n in some] for range_, some in places.items()}


def train(data: Path, backbone: Path, work: Path, seed: int = 0) -> Trained:
    """Train a network of the recipe `evolve` on this backbone; its graph is in `work`."""
    images = read_images(data, work, seed)
    recipe = resolve("evolve", "gpu", {"backbone": str(backbone), "image_size": SIDE})
    opened = open_backbone(recipe)
    plan = opened.plan
    net = build(plan, recipe.pos_embed, recipe.pool)
    net.load(opened.tensors or {})
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
    """Return the embeddings, float [n, D]."""
    return served(plates)[1].numpy()


def operating_point(served: ServedModel, round_: RoundManifest) -> np.ndarray:
    """Return temperature and threshold from the calibration images, as the export fits them."""
    point = calibrate(served, round_)["abnormal"]
    return np.array([point["temperature"], point["threshold"]])


def export_error(served: ServedModel, graph: Path, images: list[Sample]) -> np.ndarray:
    """Return the largest difference in probability between torch and onnxruntime; raises above the export's limit."""
    differences = check_parity(served, open_session(graph), images)
    return np.array(max(differences["1"], differences["8"]))


def thumbnails(images: list[Sample]) -> np.ndarray:
    """Return raw pixels, float [images, 576]."""
    return np.concatenate([pixel_baseline.thumbnails(np.load(image.plate)[None]) for image in images])


def logits(graph: Path, images: list[Sample], threads: int, work: Path) -> np.ndarray:
    """Return the logits, float [images, 1], of the graph as the model server runs it."""
    session = runtime.load(graph.read_bytes(), "cpu", threads)
    return by_parts(images, work, graph.stem, lambda plates: runtime.run(session, plates.numpy())[0])


def compare(trained: Trained, plain: np.ndarray, small: np.ndarray) -> dict:
    """Compare logits [images, 1] of fp32 and int8; return the table. SystemExit if a class has too few images."""
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
            "raw_pixels": round(auc(trained.pixel_baseline[:, 0], labels[:, 0]), 5),
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
    """Train one network; return the comparison of its fp32 and int8 graphs."""
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    trained = train(data, backbone, work)
    small = quantised(trained.graph, work / "int8.onnx")
    plain = logits(trained.graph, trained.images, threads, work)
    return compare(trained, plain, logits(small, trained.images, threads, work))


def show(result: dict) -> None:
    """Print the table."""
    area, (low, high) = result["auc"], result["interval"]
    print(
        f"trained, {result['images']} images of {result['patients']} patients not used in training, {result['pixels']} px"
    )
    print(f"  AUC: raw pixels {area['raw_pixels']:.4f}, fp32 {area['fp32']:.4f}, int8 {area['int8']:.4f}")
    print(f"  int8 - fp32 {result['difference']:+.4f} [{low:+.4f}, {high:+.4f}] (95 %, by patient)")
    print(f"  rule, lower end > {-result['margin']:g}:", "met" if result["kept"] else "missed")
    print(f"  decisions that flip at {result['threshold']:.3f}: {result['decisions_flipped']}")
    within = "within" if result["within_gate_limit"] else "beyond"
    print(f"  largest |dp| {result['largest_difference']:.4f}, {within} the gate's {result['gate_limit']:g}")
