"""The patient whom tests forget: the images, a site where they are in every place, and a search for what is left."""

from datetime import UTC, datetime
from pathlib import Path

from agent.images import labels
from agent.ledger.database import Ledger
from agent.results import reporting
from agent.rounds import records
from agent.site.site import Site
from dicom.node.commitment import Pending, Request
from dicom.pseudonyms import patient_key, study_mark
from tests.conftest import make_site
from tests.support.agent.crash_line import write_labels
from tests.support.agent.images import InProcessExaminer, put, save, take_in, xray
from tests.support.agent.models import InProcessServer, add_model
from tests.support.deploy.model_server import FINDINGS

PATIENT, NAME, FILE = "HN-0815-4711", "GRUBER^LEOPOLDINE", "gruber_leopoldine.png"
NOW = datetime.now(UTC)
WHO = ("Dr Osei", "the patient asked for it")


def theirs(seed: int, **facts: object):
    """An image of the patient who will be forgotten."""
    ds = xray(seed, patient=PATIENT, **facts)
    ds.PatientName = NAME
    ds.AccessionNumber = f"ACC-GRUBER-{seed}"
    return ds


def the_key(site: Site) -> str:
    return patient_key(site.key("pseudonym.key"), PATIENT, "", "")[0]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def found(site: Site, words: list[bytes]) -> list[tuple[str, bytes]]:
    """Every place in the site folder, names of files included, that holds one of these."""
    files = everything(site.root).items()
    return [(name, word[:60]) for name, data in files for word in words if word in data or word in name.encode()]


def score_all(site: Site, ledger: Ledger) -> None:
    while reporting.score_waiting(site, ledger, InProcessServer(site, ledger)):  # type: ignore[arg-type]
        pass


def a_site(folder: Path) -> Site:
    return make_site(
        folder,
        site={"findings": list(FINDINGS)},
        results={"sr": True, "sc": True, "destination": "PACS@127.0.0.1:1"},
        patients={"golden": 0.0, "golden_next": 0.0, "calibration": 0.0, "validation": 0.0},
    )


def a_life(folder: Path) -> tuple[Site, list[bytes]]:
    """A site where the patient's images are in every place that an image can be in; what must not be found after."""
    site = a_site(folder)
    with site.ledger() as ledger:
        add_model(site, ledger, 1)
        corrected = theirs(3)
        lateral = theirs(4, view="LL")
        sent = [theirs(1), theirs(2), theirs(3), lateral, *(xray(seed) for seed in range(20, 26))]
        for number, ds in enumerate(sent):
            put(site, ds, f"{number}.dcm")
        take_in(site, ledger)
        corrected.StudyInstanceUID = "1.2.826.777.888"  # a new version of the third
        put(site, corrected)
        broken = save(theirs(5), site.root / "run" / "broken.dcm").read_bytes()
        site.inbox.put(b"\0" * 128 + b"DICX" + broken[132:3000])  # unreadable, and names the patient all the same
        take_in(site, ledger)
        with ledger.transaction():
            ledger.run("UPDATE image SET file = ? WHERE sop_uid = ?", FILE, theirs(1).SOPInstanceUID)
        (site.root / "run" / "broken.dcm").unlink()
        score_all(site, ledger)
        uids = [str(theirs(seed).SOPInstanceUID) for seed in (1, 2)] + [str(xray(20).SOPInstanceUID)]
        write_labels(site.root / "run" / "labels.csv", [(uid, FINDINGS[0], n % 2) for n, uid in enumerate(uids)])
        labels.import_csv(site, ledger, site.root / "run" / "labels.csv", "Dr Osei")
        (site.root / "run" / "labels.csv").unlink()
        with ledger.transaction():
            for ds in (theirs(1), xray(20)):
                ledger.insert(
                    "pulled",
                    source="PACS",
                    study=study_mark(site.key("pseudonym.key"), str(ds.StudyInstanceUID)),
                    modalities="CR",
                    instances=1,
                    images=1,
                    at="",
                )
        row = records.plan(site, ledger, "now", NOW)
        mine = ledger.rows("SELECT * FROM image WHERE patient_key = ?", the_key(site))
    assert {row["state"] for row in mine} == {"labelled", "predicted", "rejected"}
    caches(site, row["name"], [row["plate"] for row in mine if row["plate"]])
    put(site, theirs(6))  # waits in the inbox
    save(theirs(7), site.root / "drop" / "late.dcm")
    orphan = save(theirs(8), site.root / "run" / "orphan.dcm")  # kept by an intake that died before its row
    examined = next(iter(InProcessExaminer(site).examine([orphan])))[1]
    site.store.keep_original(orphan, examined.sha256)
    site.store.keep_plate(examined.plate, examined.sha256)
    orphan.unlink()
    references = ((str(theirs(1).SOPClassUID), str(theirs(1).SOPInstanceUID)),)
    Pending(site.root / "node" / "commitment").keep(Request("PACS", "1.2.3.4", references, 0.0))
    words = [PATIENT, NAME, "ACC-GRUBER", "GRUBER", FILE, the_key(site), *(row["sha256"] for row in mine)]
    words += [row["pixel_sha256"] for row in mine if row["pixel_sha256"]]
    for ds in (*(theirs(seed) for seed in range(1, 9)), corrected):
        words += [str(ds.SOPInstanceUID), str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID)]
    bits = [theirs(seed).PixelData[5000:5064] for seed in range(1, 9)]
    bits += [site.store.plate(row["plate"]).tobytes()[131072:131136] for row in mine if row["plate"]]
    bits += [word.encode() for word in words]
    assert len(found(site, bits)) > 50
    return site, bits


def caches(site: Site, name: str, plates: list[str]) -> None:
    """What a round makes of its images on the way, as the learner lays it out."""
    folder = site.rounds / name
    for part in ("shard", "checkpoint", ".tokens.tmp"):
        (folder / part).mkdir()
        packed = b"".join(site.store.plate(plate).tobytes() for plate in plates)
        (folder / part / "levels.bin").write_bytes(packed)
    (folder / "learner.log").write_text(f"{plates[0]}: not a plate\n")
