"""Export of a trained network to the parts of a bundle: model.onnx, card, thresholds, probe and state.

The ONNX graph includes preprocessing and the temperature of each finding: uint8 plates in, calibrated logits out. Its
output is compared with torch before it is written. Must not seal or sign: the agent does.
"""

import contextlib
import io
import logging
import platform
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from torch import Tensor, nn

from cxrloop.durable import whole_folder, write_json
from cxrloop.plate import PLATE_SHAPE, PLATE_VERSION
from learner.data.augment import normalise, to_image
from learner.data.plates import label_table, read_plates
from learner.engine.checkpoint import save_weights
from learner.engine.step import State, require_finite
from learner.errors import LearnerError
from learner.evaluation.calibrate import auc, temperature, threshold
from learner.networks.backbone import Plan, resized
from learner.networks.blend import Blend, grey_levels, read_blend
from learner.networks.heads import Network
from learner.networks.pooling import resize_matrix
from learner.round.manifest import RoundManifest, Sample
from learner.round.recipe import Recipe
from learner.training.beside_pixels import beside_pixels
from learner.training.forgetting import forgotten

OPSET = 18
PARITY = 1e-3  # largest allowed difference in probability between torch and onnxruntime
PARITY_SAMPLES = 32
PROBES = 8


class ServedModel(nn.Module):
    """The served model: uint8 plates (N, 512, 512) to logits (N, F), embedding (N, D) and heatmap (N, F, g, g).

    The heatmap is the signed contribution of each patch to the logit through the last attention, in logits; with a blend
    also that of its simple features. `blend` None: the network's logits alone.
    """

    matrix: Tensor
    temperatures: Tensor

    def __init__(self, network: Network, plan: Plan, recipe: Recipe, blend: Blend | None = None) -> None:
        super().__init__()
        self.backbone = resized(network.backbone, plan, recipe.image_size)
        self.blend = blend
        if blend is not None:
            blend.set_grid(recipe.image_size // self.backbone.patch)
        self.cls_head = network.cls_head
        self.recipe = recipe
        self.register_buffer("matrix", resize_matrix(PLATE_SHAPE[0], recipe.image_size))
        self.register_buffer("temperatures", torch.ones(network.cls_head.findings))

    def forward(self, plates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = normalise(to_image(plates, self.matrix), self.recipe)
        cls, trace = self.backbone.trace(images)
        logits, heatmap = self.cls_head(cls), trace.contributions(self.cls_head.gradient(cls))
        if self.blend is not None:
            grey = grey_levels(plates)
            logits, heatmap = self.blend(grey, logits), self.blend.contributions(grey, heatmap)
        return logits / self.temperatures, cls, heatmap / self.temperatures[:, None, None]


def write_parts(
    target: Path,
    state: State,
    plan: Plan,
    manifest: RoundManifest,
    now: datetime,
    serve: str,
    chosen: str | None = None,
) -> None:
    """Measure, calibrate and export a network; write the folder `target` whole or not at all.

    serve: "student" or "teacher"; chosen: name of the candidate, for the card. Raises LearnerError where ONNX and torch
    differ, or where the output is not finite.
    """
    device = next(state.student.parameters()).device
    network = state.teacher if serve == "teacher" else state.student
    model = ServedModel(network, plan, state.recipe, read_blend(state.extra)).to(device).eval()
    with torch.no_grad():
        require_finite("logits of the probe", model(torch.from_numpy(probe_plates()).to(device)))
    metrics = {}
    validation = manifest.of("validation")
    logits, labels = score(model, validation), label_table(validation).numpy() if validation else None
    for i, finding in enumerate(manifest.findings):
        known = 0 if labels is None else int((~np.isnan(labels[:, i])).sum())
        metrics[finding] = {"auc": None if labels is None else auc(logits[:, i], labels[:, i]), "n": known}
    thresholds = calibrate(model, manifest)
    model = model.cpu()
    with whole_folder(target) as folder:
        export_onnx(model, folder / "model.onnx")
        session = open_session(folder / "model.onnx")
        parity = check_parity(model, session, validation)
        plates = probe_plates()
        np.savez(folder / "probe.npz", plates=plates, logits=np.asarray(session.run(["logits"], {"plates": plates})[0]))
        write_json(folder / "thresholds.json", thresholds)
        card = make_card(state, manifest, metrics, parity, model, now, serve)
        card |= {"floor": beside_pixels(manifest, logits), "candidate": chosen}
        card |= {"forgetting": forgotten(target, manifest, logits, open_session)}
        write_json(folder / "card.json", card)
        save_weights(folder / "state.safetensors", state, plan, manifest.findings)


def make_card(
    state: State, manifest: RoundManifest, metrics: dict, parity: dict, model: ServedModel, now: datetime, serve: str
) -> dict[str, Any]:
    """Return the model card: origin, recipe, metrics, parity and versions."""
    return {
        "findings": list(manifest.findings), "round": manifest.name, "parent": manifest.parent, "phase": state.phase,
        "plate_version": PLATE_VERSION, "made_at": now.isoformat(timespec="seconds"),
        "metrics": metrics, "parity": parity, "temperatures": model.temperatures.tolist(), "serve": serve,
        "train_images": len(manifest.unlabelled), "labelled": len(manifest.labelled),
        "poison": state.recipe.poison_teacher, "seed": state.recipe.seed, "notes": state.notes,
        "recipe": state.recipe.to_dict(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
            "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__,
        },
    }  # fmt: skip


@torch.no_grad()
def score(model: ServedModel, samples: Sequence[Sample]) -> np.ndarray:
    """Return logits (N, F) of samples, computed in torch on the model's device."""
    device, rows = model.matrix.device, [np.empty((0, len(model.temperatures)), np.float32)]
    for low in range(0, len(samples), 16):
        rows.append(model(read_plates(samples[low : low + 16]).to(device))[0].cpu().numpy())
    return np.concatenate(rows)


def calibrate(model: ServedModel, manifest: RoundManifest) -> dict[str, Any]:
    """Fit temperatures, which the model keeps, and thresholds on calibration patients; return thresholds by finding."""
    samples = manifest.of("calibration")
    logits = score(model, samples)
    labels = label_table(samples).numpy() if samples else np.empty((0, len(manifest.findings)))
    result = {}
    for i, finding in enumerate(manifest.findings):
        fitted = temperature(logits[:, i], labels[:, i])
        model.temperatures[i] = fitted
        scores = 1 / (1 + np.exp(-logits[:, i].astype(np.float64) / fitted))
        result[finding] = threshold(scores, labels[:, i]) | {"temperature": fitted}
    return result


def export_onnx(model: ServedModel, path: Path) -> None:
    """Write the model as one ONNX file with dynamic batch size."""
    example = torch.zeros((2, *PLATE_SHAPE), dtype=torch.uint8)
    with _quiet():
        torch.onnx.export(
            model, (example,), path, dynamo=True, opset_version=OPSET, external_data=False, verbose=False,
            input_names=["plates"], output_names=["logits", "embedding", "heatmap"],
            dynamic_shapes={"plates": {0: torch.export.Dim("images", min=1, max=4096)}},
        )  # fmt: skip
    onnx.checker.check_model(str(path))


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """Open an ONNX file on the CPU, the reference for all other providers."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def check_parity(
    model: ServedModel, session: onnxruntime.InferenceSession, samples: Sequence[Sample]
) -> dict[str, float]:
    """Return the largest difference in probability between ONNX and torch at batch sizes 1 and 8. Raises LearnerError.

    Compares on validation plates, or on the probe where there are none ("images": 0).
    """
    plates = read_plates(samples[:PARITY_SAMPLES]) if samples else torch.from_numpy(probe_plates())
    worst = {"1": 0.0, "8": 0.0}
    for size in (1, 8):
        for low in range(0, len(plates), size):
            part = plates[low : low + size]
            exported = torch.from_numpy(session.run(["logits"], {"plates": part.numpy()})[0])
            difference = (exported.sigmoid() - model(part)[0].sigmoid()).abs().max().item()
            worst[str(size)] = float(np.maximum(worst[str(size)], difference))  # Python's max ignores nan
    if not max(worst.values()) <= PARITY:
        raise LearnerError(
            f"parity: onnxruntime and torch differ by {max(worst.values()):.2g} in probability (> {PARITY:g})"
        )
    return worst | {"images": min(len(samples), PARITY_SAMPLES)}


def probe_plates() -> np.ndarray:
    """Return uint8 [8, 512, 512] of waves and noise, so that a bundle contains no patient's image."""
    rng = np.random.default_rng(20)
    y, x = np.mgrid[0 : PLATE_SHAPE[0], 0 : PLATE_SHAPE[1]] / PLATE_SHAPE[0]
    plates = []
    for i in range(PROBES):
        wave = np.sin((i + 1) * np.pi * x) * np.cos((PROBES - i) * np.pi * y)
        plates.append(np.clip(128 + 90 * wave + rng.normal(0, 12, PLATE_SHAPE), 0, 255).astype(np.uint8))
    return np.stack(plates)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the stages and internal warnings that torch's ONNX exporter prints."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
