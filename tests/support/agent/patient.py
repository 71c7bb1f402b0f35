"""The patient whom tests forget: the images, a site that holds them in every place, and a search for what is left."""

from datetime import UTC, datetime
from pathlib import Path

from agent.images import labels
from agent.rounds import planning
from agent.site.site import Site
from dicom.node.commitment import Pending, Request
from dicom.pseudonyms import patient_key, study_mark
from tests.conftest import make_site
from tests.support.agent.crash_line import write_labels
from tests.support.agent.images import InProcessExaminer, put, save, take_in, xray
from tests.support.agent.models import add_model
from tests.support.agent.reporting_site import score_all
from tests.support.deploy.model_server import FINDINGS

PATIENT, NAME, FILE = "HN-0815-4711", "GRUBER^LEOPOLDINE", "gruber_leopoldine.png"
NOW = datetime.now(UTC)
BY_AND_REASON = ("Dr Osei", "the patient asked for it")


def patient_image(seed: int, **facts: object):
    """Return an image of the patient."""
    dataset = xray(seed, patient=PATIENT, **facts)
    dataset.PatientName = NAME
    dataset.AccessionNumber = f"ACC-GRUBER-{seed}"
    return dataset


def pseudonym(site: Site) -> str:
    """Return the patient's pseudonym on this site."""
    return patient_key(site.key("pseudonym.key"), PATIENT, "", "")[0]


def all_files(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def traces(site: Site, parts: list[bytes]) -> list[tuple[str, bytes]]:
    """Return (file, part) for every file of the site whose name or content holds one of these parts."""
    files = all_files(site.root).items()
    return [(name, part[:60]) for name, data in files for part in parts if part in data or part in name.encode()]


def make_patient_site(folder: Path) -> Site:
    """Return an empty site that reports to a PACS and assigns every patient to training."""
    return make_site(
        folder,
        site={"findings": list(FINDINGS)},
        results={"sr": True, "sc": True, "destination": "PACS@127.0.0.1:1"},
        patients={"golden": 0.0, "golden_next": 0.0, "calibration": 0.0, "validation": 0.0},
    )


def make_site_full_of_patient(folder: Path) -> tuple[Site, list[bytes]]:
    """Return a site that holds the patient's images in every place, and byte strings that identify the patient."""
    site = make_patient_site(folder)
    with site.ledger() as ledger:
        add_model(site, ledger, 1)
        corrected = patient_image(3)
        lateral = patient_image(4, view="LL")
        sent = [*map(patient_image, (1, 2, 3)), lateral, *(xray(seed) for seed in range(20, 26))]
        for number, dataset in enumerate(sent):
            put(site, dataset, f"{number}.dcm")
        take_in(site, ledger)
        corrected.StudyInstanceUID = "1.2.826.777.888"  # a new version of the third
        put(site, corrected)
        whole = save(patient_image(5), site.root / "run" / "broken.dcm").read_bytes()
        site.inbox.put(b"\0" * 128 + b"DICX" + whole[132:3000])  # unreadable, with a readable patient id
        (site.root / "run" / "broken.dcm").unlink()
        take_in(site, ledger)
        with ledger.transaction():
            ledger.run("UPDATE image SET file = ? WHERE sop_uid = ?", FILE, patient_image(1).SOPInstanceUID)
        score_all(site, ledger)
        uids = [str(dataset.SOPInstanceUID) for dataset in (patient_image(1), patient_image(2), xray(20))]
        label_file = site.root / "run" / "labels.csv"
        write_labels(label_file, [(uid, FINDINGS[0], n % 2) for n, uid in enumerate(uids)])
        labels.import_csv(site, ledger, label_file, "Dr Osei")
        label_file.unlink()
        with ledger.transaction():
            for dataset in (patient_image(1), xray(20)):
                study = study_mark(site.key("pseudonym.key"), str(dataset.StudyInstanceUID))
                ledger.insert("pulled", source="PACS", study=study, modalities="CR", instances=1, images=1, at="")
        planned = planning.plan(site, ledger, "now", NOW)
        rows = ledger.rows("SELECT * FROM image WHERE patient_key = ?", pseudonym(site))
    assert {row["state"] for row in rows} == {"labelled", "predicted", "rejected"}
    write_round_caches(site, planned.name, [row["plate"] for row in rows if row["plate"]])
    put(site, patient_image(6))  # waits in the inbox
    save(patient_image(7), site.root / "drop" / "late.dcm")
    keep_without_row(site, patient_image(8))
    references = ((str(patient_image(1).SOPClassUID), str(patient_image(1).SOPInstanceUID)),)
    Pending(site.root / "node" / "commitment").keep(Request("PACS", "1.2.3.4", references, 0.0))
    words = [PATIENT, NAME, "ACC-GRUBER", "GRUBER", FILE, pseudonym(site), *(row["sha256"] for row in rows)]
    words += [row["pixel_sha256"] for row in rows if row["pixel_sha256"]]
    for dataset in (*map(patient_image, range(1, 9)), corrected):
        words += [str(dataset.SOPInstanceUID), str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID)]
    parts = [patient_image(seed).PixelData[5000:5064] for seed in range(1, 9)]
    parts += [site.store.plate(row["plate"]).tobytes()[131072:131136] for row in rows if row["plate"]]
    parts += [word.encode() for word in words]
    assert len(traces(site, parts)) > 50
    return site, parts


def keep_without_row(site: Site, dataset) -> None:
    """Keep an image in the store as an intake does that dies before it writes the row."""
    path = save(dataset, site.root / "run" / "orphan.dcm")
    examined = next(iter(InProcessExaminer(site).examine([path])))[1]
    assert examined.plate is not None
    site.store.keep_original(path, examined.sha256)
    site.store.keep_plate(examined.plate, examined.sha256)
    path.unlink()


def write_round_caches(site: Site, name: str, plates: list[str]) -> None:
    """Write into a round's folder what a learner keeps of its images: packed plates, a checkpoint, tokens, a log."""
    folder = site.rounds / name
    packed = b"".join(site.store.plate(plate).tobytes() for plate in plates)
    for part in ("shard", "checkpoint", ".tokens.tmp"):
        (folder / part).mkdir()
        (folder / part / "levels.bin").write_bytes(packed)
    (folder / "learner.log").write_text(f"{plates[0]}: not a plate\n")
