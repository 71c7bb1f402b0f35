"""The record of how `tests/sites/0.1.0` was made. It runs on the code of version 0.1.0 alone (git commit fdbbe24).

Keep it as it is, and never run it again: the folder stands for sites in the field, which nobody can make again.
Run from the root of that commit: `python -m tests.sites.make_0_1_0 DIR`.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import timm.models.vision_transformer as vit
import torch
from safetensors.torch import save_file

from agent import config
from agent.ranges import range_of
from agent.site import Site, init
from dicom.phantom import Phantom, draw, hip, lateral
from dicom.privacy import patient_key
from dicom.sender import send
from dicom.wrap import wrap
from tests import deploy_site
from tests.answers import Archive
from tests.appliance import Appliance

FINDINGS = ("cardiomegaly", "effusion")
NODE, SERVER, PACS = 11911, 11912, 11119
SIDE = 96  # pixels of an image
SETTINGS = {
    "site": {"name": "a site of version 0.1.0", "findings": list(FINDINGS)},
    "node": {"port": NODE, "min_free_mb": 1},
    "admission": {"quality": False},
    "infer": {"port": SERVER, "provider": "cpu", "threads": 1},
    "patients": {"golden": 0.4, "golden_next": 0.0, "calibration": 0.1, "validation": 0.1},
    "learn": {"recipe": "tiny.toml", "profile": "demo", "window": ""},
    "gate": {"looks_per_year": 12},
    "results": {"sr": True, "destination": f"PACS@127.0.0.1:{PACS}"},
    "retention": {"refuse_free_mb": 0},
}
RECIPE = """base = "distl"
backbone = "tiny.safetensors"
image_size = 32
local_size = 16
local_views = 2
prototypes = 32
head_hidden = 16
bottleneck = 8
class_hidden = 16
batch = 2
t0_epochs = 400
epochs = 10
"""
# range of the patient, and whether each finding is there
WANTED = [
    ("golden", (0, 0)), ("golden", (1, 1)), ("golden", (0, 1)), ("golden", (1, 0)),
    ("train", (1, 0)), ("train", (0, 1)), ("calibration", (1, 0)), ("train", (1, 1)),
]  # fmt: skip


def main(folder: Path) -> None:
    """Make the site in `folder`, which must not exist."""
    site = init(folder, config.checked(SETTINGS))
    work = folder.with_name(folder.name + ".work")
    work.mkdir()
    appliance = Appliance(site)
    *known, last = chosen(site)
    take_in(appliance, work, known)
    add_models(appliance, work, [1])
    answer_the_pacs(appliance, work, last)
    reason = "the patient asked for it"
    appliance.ask("forget", "ODD-2", "--and-refuse", "--by", "Dr. A", "--reason", reason)
    add_models(appliance, work, [2, 3])
    pause_a_round(appliance)
    assert appliance.ask("audit", "verify")["ok"]
    shutil.rmtree(work)
    tidy(folder)


def chosen(site: Site) -> list[Phantom]:
    """The first phantom of each wanted range and set of findings, each of its own patient."""
    phantoms = draw(400, 1, FINDINGS, 0.5, (0.5, 1.3), repeat=0)
    found = []
    for range_, labels in WANTED:
        for phantom in phantoms:
            key, identified = patient_key(site.key("pseudonym.key"), phantom.patient, "", "")
            here = range_of(site.key("pseudonym.key"), key, identified, site.config.patients)
            if (here, tuple(phantom.labels[name] for name in FINDINGS)) == (range_, labels) and phantom not in found:
                found.append(phantom)
                break
    assert len(found) == len(WANTED)
    return found


def image(phantom: Phantom, **facts: object):
    """The phantom as a DICOM data set."""
    named = {"view": phantom.view, "sex": phantom.sex, "age_years": phantom.age_years, **facts}
    return wrap(phantom.pixels(SIDE), phantom.patient, **named)  # type: ignore[arg-type]


def take_in(appliance: Appliance, work: Path, phantoms: list[Phantom]) -> None:
    """`import`, `labels import` and `golden freeze`: images with labels, two rejected, one quarantined."""
    folder = work / "images"
    folder.mkdir()
    rows = []
    for number, phantom in enumerate(phantoms):
        image(phantom).save_as(folder / f"image{number}.dcm", enforce_file_format=True)
        rows += [(f"image{number}.dcm", name, phantom.labels[name], "report") for name in FINDINGS]
    rows += [(f"image{number}.dcm", FINDINGS[0], phantoms[number].labels[FINDINGS[0]], "radiologist")]
    side = wrap(lateral(1, SIDE), "ODD-1", view="LL")
    side.save_as(folder / "lateral.dcm", enforce_file_format=True)
    wrap(hip(1, SIDE), "ODD-2", view="AP", body_part="HIP").save_as(folder / "hip.dcm", enforce_file_format=True)
    (folder / "cut.dcm").write_bytes((folder / "lateral.dcm").read_bytes()[:9000])
    said = appliance.ask("import", str(folder))
    assert said == {"seen": 10, "stored": 7, "rejected": 2, "quarantined": 1, "duplicate": 0}, said
    with (work / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "finding", "value", "source"), *rows])
    appliance.ask("labels", "import", str(work / "labels.csv"), "--by", "Dr. A")
    assert appliance.ask("golden", "freeze", "--by", "Dr. A")["images"] == 4


def add_models(appliance: Appliance, work: Path, seeds: list[int]) -> None:
    """`models import`: model 1 serves as the baseline, model 2 gets no look, model 3 a look and a verdict."""
    deploy_site.FINDINGS = FINDINGS
    for seed in seeds:
        path = deploy_site.write_model(work / f"model{seed}.onnx", seed)
        said = appliance.ask("models", "import", str(path), "--by", "Dr. A", *(["--look"] if seed == 3 else []))
        assert said["is_baseline"] == (seed == 1)
        if seed > 1:
            state = appliance.ask("round", "show", said["round"])["state"]
            assert state == {2: "no_look", 3: "not_shown"}[seed], said


def answer_the_pacs(appliance: Appliance, work: Path, phantom: Phantom) -> None:
    """Seven reports reach a PACS; then it is away, and of an image and its corrected version one heatmap waits."""
    with Archive(PACS), appliance:
        appliance.until("ingest", predicted=7, returned=7)
    appliance.ask("status", code=0)
    settings = Path(appliance.settings)
    text = settings.read_text("utf-8")
    settings.write_text(text.replace("sr = true", "sr = false").replace("sc = false", "sc = true"), "utf-8")
    first = image(phantom, view="PA")
    corrected = image(phantom, view="AP", sop_uid=first.SOPInstanceUID, study_uid=first.StudyInstanceUID)
    with appliance:
        for number, dataset in enumerate((first, corrected)):
            path = work / f"sent{number}.dcm"
            dataset.save_as(path, enforce_file_format=True)
            assert [status for _, status in send([path], "127.0.0.1", NODE, "CXRLOOP")] == [0]
            appliance.until("ingest", inbox=0, stored=8 + number, predicted=8 + number)
        appliance.until("outbox", waiting=1)


def pause_a_round(appliance: Appliance) -> None:
    """`round run --now`, whose learner is told to stop while it learns the labelled images."""
    root = appliance.site.root
    torch.manual_seed(1)
    net = vit.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True
    )
    save_file(net.state_dict(), root / "tiny.safetensors", {"num_heads": "2"})
    (root / "tiny.toml").write_text(RECIPE, "utf-8")
    command = [sys.executable, "-m", "agent.cli", "round", "run", "--now", "--config", "appliance.toml"]
    with subprocess.Popen(command, cwd=root) as process:  # in the site folder: the recipe names a file beside it
        progress = root / "rounds" / "r0003" / "progress.json"
        while not (progress.exists() and '"t0"' in progress.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)
        for pid in learners(process.pid):
            os.kill(pid, signal.SIGTERM)
    assert appliance.ask("round", "show", "r0003")["state"] == "paused"


def learners(parent: int) -> Iterator[int]:
    """Process ids of a command's learners."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                yield int(path.name)
        except (FileNotFoundError, ProcessLookupError):
            continue


def tidy(folder: Path) -> None:
    """Remove logs, locks and empty folders: git keeps none of them, and a site makes them again."""
    for path in (*folder.rglob("*.log"), *folder.rglob("*.lock"), *folder.rglob("lock")):
        path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])  # for the commands that start elsewhere
    main(Path(sys.argv[1]).resolve())
