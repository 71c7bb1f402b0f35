"""Make the pictures of the documentation: a phantom goes through the appliance, and Orthanc shows the results.

`python tools/doc_pictures.py` needs Orthanc, dcmtk and Chromium, and writes docs/img/*.png. The image is drawn; no
patient is in it. The model is linear in 16 x 16 grey values, fitted on phantoms in a second: the pictures show the form
of a result, not the quality of a model.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from agent.results import outbox
from agent.rounds import import_model
from agent.site import config
from agent.site.site import init
from bench.common import results
from bench.common.appliance import ROOT, WAIT_S, dcmtk, orthanc, serving, wait_until
from dicom.client.sender import send
from dicom.phantom.phantom import Phantom, draw
from dicom.phantom.wrap import wrap
from dicom.pixels.plate import decode, render
from tests.support.ports import free_ports

FINDINGS = ("cardiomegaly", "effusion", "opacity")
GRID = 16
FITTED_ON = 240  # phantoms
COLOURS = 128  # of a picture; keeps the files small
OUT = ROOT / "docs" / "img"


def main() -> None:
    """Run an appliance and Orthanc, send one phantom, write the pictures."""
    results.parser(__doc__).parse_args()
    ports = free_ports(4)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        values = {
            "site": {"findings": list(FINDINGS), "name": "phantoms only"},
            "node": {"port": ports[0], "min_free_mb": 1},
            "infer": {"port": ports[1], "provider": "cpu", "threads": 1},
            "learn": {"window": ""},
            "results": {"sr": True, "sc": True, "destination": f"ORTHANC@127.0.0.1:{ports[3]}"},
        }
        site = init(folder / "site", config.checked(values))
        linear_model(folder / "linear.onnx")
        with site.ledger() as ledger:
            import_model.import_file(site, ledger, folder / "linear.onnx", "bench", False)
        chosen = next(
            phantom for phantom in draw(60, seed=77, strength=(0.9, 1.0), repeat=0) if phantom.labels["effusion"]
        )
        image = wrap(chosen.pixels(1024), chosen.patient, chosen.view, "20260102", chosen.sex, chosen.age_years)
        image.PatientName, image.StudyDescription = "Phantom^Drawn", "Chest, drawn by dicom/phantom/phantom.py"
        with orthanc(folder / "orthanc", ports[2], ports[3]) as url, serving(folder / "site"):
            sent = [
                status
                for port in (ports[3], ports[0])
                for _, status in send([image], "127.0.0.1", port, called(port, ports))
            ]
            assert sent == [0, 0], sent
            with site.ledger() as ledger:
                wait_until(lambda: ledger.counters()["returned"] == 1, None, lambda: outbox.state(ledger))
            pictures(url, folder)


def called(port: int, ports: list[int]) -> str:
    """Return the AE title at a port."""
    return "CXRLOOP" if port == ports[0] else "ORTHANC"


def linear_model(path: Path) -> None:
    """Write a logistic regression on block means as ONNX; its heatmap is each block's share of the logit."""
    images = draw(FITTED_ON, seed=5, findings=FINDINGS, prevalence=0.5, strength=(0.5, 1.0), repeat=0)
    plates = np.stack([plate(image) for image in images])
    blocks = (
        plates.reshape(len(images), GRID, 512 // GRID, GRID, 512 // GRID).mean((2, 4)).reshape(len(images), -1) / 255
    )
    mean = blocks.mean(0)
    weights, bias = [], []
    for finding in FINDINGS:
        truth = np.array([image.labels[finding] for image in images], float)
        w, b = fit(blocks - mean, truth)
        weights.append(w)
        bias.append(b)
    constants = {
        "scale": np.float32(1 / 255), "mean": mean.astype(np.float32).reshape(1, 1, GRID, GRID), "axis": np.array([1]),
        "weights": np.stack(weights).astype(np.float32).reshape(1, len(FINDINGS), GRID, GRID),
        "bias": np.array(bias, np.float32), "axes": np.array([2, 3]), "flat": np.array([0, -1]),
    }  # fmt: skip
    side = 512 // GRID
    nodes = [
        helper.make_node("Cast", ["plates"], ["bytes"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["bytes", "scale"], ["unit"]),
        helper.make_node("Unsqueeze", ["unit", "axis"], ["image"]),
        helper.make_node("AveragePool", ["image"], ["pooled"], kernel_shape=[side, side], strides=[side, side]),
        helper.make_node("Sub", ["pooled", "mean"], ["centred"]),
        helper.make_node("Reshape", ["centred", "flat"], ["embedding"]),
        helper.make_node("Mul", ["centred", "weights"], ["heatmap"]),
        helper.make_node("ReduceSum", ["heatmap", "axes"], ["sum"], keepdims=0),
        helper.make_node("Add", ["sum", "bias"], ["logits"]),
    ]
    shapes = {"logits": [len(FINDINGS)], "embedding": [GRID * GRID], "heatmap": [len(FINDINGS), GRID, GRID]}
    graph = helper.make_graph(
        nodes, "linear", [helper.make_tensor_value_info("plates", TensorProto.UINT8, ["N", 512, 512])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape]) for name, shape in shapes.items()],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def plate(phantom: Phantom) -> np.ndarray:
    """Return the plate of a phantom by the product's own pixel path."""
    image = wrap(phantom.pixels(), phantom.patient, phantom.view)
    return render(image, decode(image))


def fit(x: np.ndarray, truth: np.ndarray, ridge: float = 1.0) -> tuple[np.ndarray, float]:
    """Return weights and intercept of a ridge logistic regression, by Newton's method."""
    x = np.column_stack([x, np.ones(len(x))])
    penalty = np.diag([ridge] * (x.shape[1] - 1) + [0.0])
    w = np.zeros(x.shape[1])
    for _ in range(15):
        p = 1 / (1 + np.exp(-x @ w))
        w -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + penalty, x.T @ (p - truth) + penalty @ w)
    return w[:-1], float(w[-1])


def pictures(url: str, folder: Path) -> None:
    """Write Orthanc's page of the study, its rendering of the heatmap, and dcmtk's rendering of the report."""
    OUT.mkdir(exist_ok=True)
    (study,) = httpx.get(f"{url}/studies?expand").json()
    series = {
        entry["MainDicomTags"]["Modality"]: entry for entry in httpx.get(f"{url}/studies/{study['ID']}/series").json()
    }
    print({name: entry["MainDicomTags"].get("SeriesDescription") for name, entry in series.items()})
    capture = httpx.get(f"{url}/instances/{series['OT']['Instances'][0]}/preview", headers={"Accept": "image/png"})
    (folder / "heatmap.png").write_bytes(capture.content)
    report = folder / "report.dcm"
    report.write_bytes(httpx.get(f"{url}/instances/{series['SR']['Instances'][0]}/file").content)
    subprocess.run([dcmtk("dsr2html"), "-q", "+Rd", str(report), str(folder / "report.html")], check=True)
    photograph(f"{url}/app/explorer.html#study?uuid={study['ID']}", folder / "study.png", (1000, 620))
    photograph((folder / "report.html").as_uri(), folder / "report.png", (900, 1320))
    for name in ("study", "heatmap", "report"):
        small = Image.open(folder / f"{name}.png").convert("RGB").quantize(COLOURS)
        small.save(OUT / f"answer-{name}.png", optimize=True)
        print(f"docs/img/answer-{name}.png", small.size, f"{(OUT / f'answer-{name}.png').stat().st_size >> 10} kB")


def photograph(page: str, path: Path, size: tuple[int, int]) -> None:
    """Write a screenshot of a page."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        sys.exit("needs Chromium: apt-get install chromium")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"]
    command = [program, *options, f"--window-size={size[0]},{size[1]}", f"--screenshot={path}", page]
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)


if __name__ == "__main__":
    main()
