"""A small real site for the deploy tests: keys, a small ONNX model that keeps the bundle contract, a running server.

The model averages the plate to 4 x 4 cells, then one MatMul gives a logit for each finding.
"""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from deploy.bundle import pointer
from deploy.bundle.bundle import PURPOSE, bundle_id, seal, sha256_of
from deploy.bundle.contract import PARTS
from deploy.bundle.keys import new_keys, read_private
from deploy.bundle.onnx_import import import_onnx
from deploy.bundle.signing import sign
from deploy.client import Client

FINDINGS = ("effusion", "pneumonia", "nodule")
GRID = 4
AT = "2026-01-05T02:00:00Z"
ROOT = Path(__file__).resolve().parents[3]


def write_model(path: Path, seed: int = 0, scale: float = 1.0, work: int = 0, white_is_nan=False, **changes) -> Path:
    """Write an ONNX file. `work` adds that many large MatMuls; `changes` break the contract: dtype, plates, drop."""
    rng = np.random.default_rng(seed)
    cells, side = GRID * GRID, 512
    weights = (scale * rng.normal(size=(cells, len(FINDINGS)))).astype(np.float32)
    constants = {"scale": np.float32(1 / 255), "weights": weights, "flat": np.array([0, -1], np.int64)}
    nodes = [
        helper.make_node("Cast", ["plates"], ["bytes"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["bytes", "scale"], ["unit"]),
        helper.make_node("Unsqueeze", ["unit", "axis"], ["image"]),
        helper.make_node(
            "AveragePool", ["image"], ["pooled"], kernel_shape=[side // GRID] * 2, strides=[side // GRID] * 2
        ),
        helper.make_node("Reshape", ["pooled", "flat"], ["embedding"]),
        helper.make_node("MatMul", ["embedding", "weights"], ["bare"]),
        helper.make_node("Mul", ["pooled", "ones"], ["heatmap"]),
    ]
    constants["axis"] = np.array([1], np.int64)
    constants["ones"] = np.ones((1, len(FINDINGS), 1, 1), np.float32)
    last = "bare"
    if work:  # a slow model, for requests in flight during a swap
        constants["big"] = np.full((side, side), 1 / side, np.float32)  # keeps the mean: no slow denormal numbers
        constants["little"] = np.float32(1e-6)
        for step in range(work):
            nodes.append(helper.make_node("MatMul", [f"work{step - 1}" if step else "unit", "big"], [f"work{step}"]))
        nodes.append(helper.make_node("ReduceMean", [f"work{work - 1}", "axes"], ["mean"], keepdims=0))
        nodes.append(helper.make_node("Mul", ["mean", "little"], ["tiny"]))
        nodes.append(helper.make_node("Unsqueeze", ["tiny", "axis"], ["column"]))
        nodes.append(helper.make_node("Add", ["bare", "column"], ["slow"]))
        constants["axes"] = np.array([1, 2], np.int64)
        last = "slow"
    if white_is_nan:
        constants["one"] = np.float32(1)
        nodes.append(helper.make_node("Sub", ["one", "embedding"], ["dark"]))
        nodes.append(helper.make_node("Log", ["dark"], ["log"]))
        nodes.append(helper.make_node("Gather", ["log", "axis"], ["corner"], axis=1))
        nodes.append(helper.make_node("Sub", ["corner", "corner"], ["not_finite"]))  # -inf minus -inf is NaN
        nodes.append(helper.make_node("Add", [last, "not_finite"], ["with_nan"]))
        last = "with_nan"
    nodes.append(helper.make_node("Identity", [last], ["logits"]))
    outputs = {
        "logits": ["N", len(FINDINGS)],
        "embedding": ["N", cells],
        "heatmap": ["N", len(FINDINGS), GRID, GRID],
    }
    for name in changes.get("drop", ()):
        del outputs[name]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info(
                "plates", changes.get("dtype", TensorProto.UINT8), changes.get("plates", ["N", side, side])
            )
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def make_parts(folder: Path, seed: int = 0, **model) -> Path:
    """Write the four parts of a bundle, unsealed."""
    folder.mkdir(parents=True)
    file = write_model(folder.parent / f"{folder.name}.onnx", seed, **model)
    import_onnx(file, folder, FINDINGS)
    return folder


class Site:
    """A site folder with keys; `add` seals one more model, `point` puts it in service."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "site").mkdir(parents=True)
        self.site = folder / "site"
        self.models = self.site / "models"
        new_keys(self.site / "keys")
        self.key = read_private(self.site / "keys")

    def add(self, seed: int = 0, **model) -> str:
        """Seal a new model; return its bundle id."""
        parts = make_parts(self.folder / f"parts{seed}", seed, **model)
        return seal(parts, self.models, self.key)

    def point(self, bundle: str, previous: str | None = None) -> None:
        """Write the pointer."""
        pointer.write(self.site, bundle, previous, "a test", AT, self.key)

    def spoil_probe(self, seed: int) -> str:
        """Seal a bundle whose probe holds other logits than the model returns."""
        parts = make_parts(self.folder / f"parts{seed}", seed)
        with np.load(parts / "probe.npz") as probe:
            np.savez(parts / "probe.npz", plates=probe["plates"], logits=probe["logits"] + 0.5)
        return seal(parts, self.models, self.key)

    def add_of_plate_version(self, version: int, seed: int) -> str:
        """Sign a bundle with the right key, as another version of cxrloop would seal it."""
        parts = make_parts(self.folder / f"parts{seed}", seed)
        card = json.loads((parts / "card.json").read_text()) | {"plate_version": version}
        (parts / "card.json").write_text(json.dumps(card))
        files = {name: sha256_of(parts / name) for name in PARTS}
        body = {"bundle": bundle_id(files), "files": files}
        sealed = {**body, "signature": sign(PURPOSE, body, self.key)}
        (parts / "seal.json").write_text(json.dumps(sealed))
        shutil.move(parts, self.models / body["bundle"])
        return body["bundle"]


class TwoBundles(Site):
    """A site with the sealed bundles `a`, in service, and `b`."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.a, self.b = self.add(1), self.add(2)
        self.point(self.a)


@contextlib.contextmanager
def serving(site: Site, *arguments: str) -> Iterator[tuple[subprocess.Popen, Client]]:
    """Run `python -m deploy.server.server` on a free port; yield (process, client); kill it at the end."""
    process, url = start(site.site, *arguments)
    try:
        with Client(url) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate(timeout=10)


def start(site: Path, *arguments: str) -> tuple[subprocess.Popen, str]:
    """Start the server; return (process, URL) after its ready line."""
    command = [
        sys.executable,
        "-m",
        "deploy.server.server",
        "--site",
        str(site),
        "--port",
        "0",
        "--threads",
        "1",
        *arguments,
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    log = ""
    for line in process.stderr:
        log += line
        if ready := re.match(r"infer ready on (\S+)", line):
            return process, ready[1]
    raise AssertionError(f"the server was not ready: {log}")


def plates(images: int = 1, seed: int = 7) -> np.ndarray:
    """Return noise, uint8 [images, 512, 512]."""
    return np.random.default_rng(seed).integers(0, 256, (images, 512, 512), dtype=np.uint8)
