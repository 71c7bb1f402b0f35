"""The site that bench/serving/latency.py measures: `cxrloop serve` with a ViT-S in service, and an Orthanc beside it.

The weights are random; trained weights take the same time. Every image is one real radiograph (RG1 of pydicom-data,
CHEST PA, 1955 x 1841) with a new patient, study and UID.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import torch
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLSLossless, generate_uid
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agent.rounds import import_model
from agent.site import config
from agent.site.site import Site, init
from bench.common.appliance import orthanc, serving
from learner.networks.architecture import plan_of
from learner.networks.backbone import build
from learner.networks.heads import ClassHead, Network
from learner.round.recipe import resolve
from learner.training.export import ServedModel, export_onnx
from tests.support.ports import free_ports

FINDINGS = ("cardiomegaly", "effusion", "opacity")
SYNTAXES = ("uncompressed", "JPEG-LS", "JPEG 2000 lossless")


@dataclass(frozen=True)
class Place:
    """The running appliance: its site, its node's port, the URL of its PACS."""

    site: Site
    orthanc: str  # URL
    port: int  # of the node


def write_model(path: Path, image_size: int = 224) -> tuple[ServedModel, str]:
    """Export a ViT-S/16 of random weights to `path`; return the same network in torch, and its name."""
    torch.manual_seed(0)
    recipe = resolve("distl", "gpu", {"image_size": image_size, "arch": "vit_small_patch16"})
    plan = plan_of(recipe.arch, recipe.image_size)
    backbone = build(plan, pool=recipe.pool)
    head = ClassHead(backbone.dim, len(FINDINGS), recipe.class_hidden)
    served = ServedModel(Network(backbone, nn.Identity(), head), plan, recipe).eval()
    export_onnx(served, path)
    return served, f"{recipe.arch} at {image_size}"


@contextmanager
def running(folder: Path, model: Path, threads: int) -> Iterator[Place]:
    """Run the appliance and its PACS."""
    node, infer, http_port, dicom_port = free_ports(4)
    values = {
        "site": {"findings": list(FINDINGS), "name": "bench"},
        "node": {"port": node},
        "infer": {"port": infer, "provider": "cpu", "threads": threads},
        "learn": {"window": ""},
        "results": {"sr": True, "sc": True, "destination": f"ORTHANC@127.0.0.1:{dicom_port}"},
    }
    site = init(folder / "site", config.checked(values))
    with site.ledger() as ledger:
        import_model.import_file(site, ledger, model, "bench", False)
    with orthanc(folder / "orthanc", http_port, dicom_port) as url, serving(folder / "site"):
        yield Place(site, url, node)


def template(syntax: str) -> FileDataset:
    """Return the radiograph in one of SYNTAXES, lossless."""
    if syntax == "JPEG 2000 lossless":
        return dcmread(str(get_testdata_file("RG1_J2KR.dcm")))
    image = dcmread(str(get_testdata_file("RG1_UNCR.dcm")))
    if syntax == "JPEG-LS":
        image.PixelData = encapsulate([bytes(imagecodecs.jpegls_encode(image.pixel_array))])
        image["PixelData"].VR, image["PixelData"].is_undefined_length = "OB", True
        image.file_meta.TransferSyntaxUID = JPEGLSLossless
    return image


def write_image(image: FileDataset, path: Path) -> str:
    """Write the radiograph with a new patient and new UIDs; return its Study Instance UID."""
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    image.StudyInstanceUID, image.SeriesInstanceUID = generate_uid(), generate_uid()
    image.PatientID = image.StudyInstanceUID[-12:]
    image.save_as(path, enforce_file_format=True)
    return str(image.StudyInstanceUID)
