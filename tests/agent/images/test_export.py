"""`images export`: de-identified copies in a folder, with their labels; what may not leave is said."""

import csv
import json
from datetime import UTC, datetime, timedelta

import pydicom
import pytest
from typer.testing import CliRunner

from agent.cli.main import app
from agent.errors import Problem
from agent.images import export, labels, retention
from agent.ledger import audit
from agent.ledger.database import utc
from tests.support.agent.crash_line import write_labels
from tests.support.agent.images import put, take_in, xray


@pytest.fixture
def filled(site):
    """A site with two images of one patient, one of another, a lateral and a secondary capture; all labelled."""
    images = [xray(1, patient="ANNA"), xray(2, patient="ANNA"), xray(3), xray(4, view="LL"), xray(5)]
    images[4].SOPClassUID = images[4].file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    images[4].Modality, images[4].ConversionType = "CR", "WSD"
    images[1].StudyInstanceUID = images[0].StudyInstanceUID
    for number, ds in enumerate(images):
        put(site, ds, f"{number}.dcm")
    with site.ledger() as ledger:
        take_in(site, ledger)
        found = [(str(ds.SOPInstanceUID), "effusion", n % 2) for n, ds in enumerate(images)]
        write_labels(site.root / "run" / "l.csv", found)
        labels.import_csv(site, ledger, site.root / "run" / "l.csv", "Dr Osei")
    return site, [str(ds.SOPInstanceUID) for ds in images], str(images[0].StudyInstanceUID)


def run(site, *words: str, code: int = 0) -> dict:
    done = CliRunner().invoke(
        app, ["images", "export", *words, "--json", "--config", str(site.root / "appliance.toml")]
    )
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if code != 1 else {}


def test_images_leave_under_new_names_with_their_labels(filled, tmp_path):
    site, uids, _ = filled
    said = run(site, uids[0], uids[2], "--out", str(tmp_path / "out"), "--with-labels")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.dcm"))
    assert files == sorted(one["file"] for one in said["exported"])
    for name in files:
        ds = pydicom.dcmread(tmp_path / "out" / name)
        assert ds.PatientIdentityRemoved == "YES"
        assert f"{ds.SOPInstanceUID}.dcm" == name
    rows = list(csv.DictReader((tmp_path / "out" / "labels.csv").open()))
    assert {row["file"] for row in rows} == set(files)
    assert {(row["finding"], row["value"], row["source"]) for row in rows} == {("effusion", "0", "report")}
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert not [word for word in ("ANNA", "P0003", "Osei", *uids) if word.encode() in everything]


def test_a_study_leaves_with_all_its_images_and_an_image_number_names_one(filled, tmp_path):
    site, _, study = filled
    assert len(run(site, study, "--out", str(tmp_path / "a"))["exported"]) == 2
    assert len(run(site, "3", "--out", str(tmp_path / "b"))["exported"]) == 1
    assert not (tmp_path / "b" / "labels.csv").exists()


def test_what_may_not_leave_is_said_and_the_rest_leaves(filled, tmp_path):
    site, uids, _ = filled
    said = run(site, uids[0], uids[3], uids[4], "--out", str(tmp_path / "out"), code=2)
    assert len(said["exported"]) == 1
    why = " ".join(one["reason"] for one in said["refused"])
    assert "set aside" in why and "Secondary Capture" in why


def test_of_two_images_under_one_uid_the_second_is_refused_and_does_not_replace_the_first(filled, tmp_path):
    site, uids, _ = filled
    put(site, xray(77, patient="ANNA", sop_uid=uids[0]))
    with site.ledger() as ledger:
        take_in(site, ledger)
    out = tmp_path / "out"
    said = run(site, uids[0], "--out", str(out), code=2)
    assert [one["image"] for one in said["exported"]] == [1]
    assert "the same SOP Instance UID" in said["refused"][0]["reason"]
    run(site, "1", "--out", str(tmp_path / "alone"))
    assert [path.read_bytes() for path in out.iterdir()] == [
        path.read_bytes() for path in (tmp_path / "alone").iterdir()
    ]


def test_an_original_that_was_dropped_cannot_leave(filled, tmp_path):
    site, uids, _ = filled
    with site.ledger() as ledger:
        with ledger.transaction():
            ledger.run("INSERT INTO kept_file VALUES (1, 'original', '2000')")
        now = datetime.now(UTC)
        retention.intend(ledger, "original", now, timedelta(days=1))
        retention.finish(site, ledger)
    said = run(site, uids[0], "--out", str(tmp_path / "out"), code=2)
    assert f"dropped on {utc(now)[:10]}" in said["refused"][0]["reason"]


def test_an_unknown_uid_or_a_folder_with_something_in_it_writes_nothing(filled, tmp_path):
    site, uids, _ = filled
    run(site, uids[0], "9.9.9", "--out", str(tmp_path / "out"), code=1)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.dcm").write_bytes(b"")
    run(site, uids[0], "--out", str(tmp_path / "full"), code=1)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["old.dcm"]


def test_the_audit_knows_who_took_which_images_out(filled, tmp_path):
    site, uids, _ = filled
    with site.ledger() as ledger:
        export.export(site, ledger, uids[:1], tmp_path / "out", False, "Dr Osei")
        entry = audit.tail(ledger, 1)[0]
        assert (entry["who"], entry["what"], entry["after"]["images"]) == ("Dr Osei", "images exported", [1])
        with pytest.raises(Problem, match="not empty"):
            export.export(site, ledger, uids[:1], tmp_path / "out", False, "Dr Osei")
