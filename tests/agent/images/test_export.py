"""`images export`: de-identified copies with their labels, and the reason for each image that may not leave."""

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
    """A site with two images of a patient, an image of another, a lateral, a secondary capture; all labelled."""
    images = [xray(1, patient="ANNA"), xray(2, patient="ANNA"), xray(3), xray(4, view="LL"), xray(5)]
    images[4].SOPClassUID = images[4].file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    images[4].Modality, images[4].ConversionType = "CR", "WSD"
    images[1].StudyInstanceUID = images[0].StudyInstanceUID
    for number, ds in enumerate(images):
        put(site, ds, f"{number}.dcm")
    with site.ledger() as ledger:
        take_in(site, ledger)
        rows = [(str(ds.SOPInstanceUID), "effusion", n % 2) for n, ds in enumerate(images)]
        write_labels(site.root / "run" / "l.csv", rows)
        labels.import_csv(site, ledger, site.root / "run" / "l.csv", "Dr Osei")
    return site, [str(ds.SOPInstanceUID) for ds in images], str(images[0].StudyInstanceUID)


def run(site, *words: str, code: int = 0) -> dict:
    answer = CliRunner().invoke(
        app, ["images", "export", *words, "--json", "--config", str(site.root / "appliance.toml")]
    )
    assert answer.exit_code == code, answer.output
    return json.loads(answer.stdout) if code != 1 else {}


def test_exported_images_have_new_names_and_keep_their_labels(filled, tmp_path):
    site, uids, _ = filled
    result = run(site, uids[0], uids[2], "--out", str(tmp_path / "out"), "--with-labels")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.dcm"))
    assert files == sorted(copy["file"] for copy in result["exported"])
    for name in files:
        ds = pydicom.dcmread(tmp_path / "out" / name)
        assert ds.PatientIdentityRemoved == "YES"
        assert f"{ds.SOPInstanceUID}.dcm" == name
    rows = list(csv.DictReader((tmp_path / "out" / "labels.csv").open()))
    assert {row["file"] for row in rows} == set(files)
    assert {(row["finding"], row["value"], row["source"]) for row in rows} == {("effusion", "0", "report")}
    content = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert not [word for word in ("ANNA", "P0003", "Osei", *uids) if word.encode() in content]


def test_a_study_uid_exports_all_its_images_and_an_image_number_exports_one(filled, tmp_path):
    site, _, study = filled
    assert len(run(site, study, "--out", str(tmp_path / "a"))["exported"]) == 2
    assert len(run(site, "3", "--out", str(tmp_path / "b"))["exported"]) == 1
    assert not (tmp_path / "b" / "labels.csv").exists()


def test_an_image_that_may_not_leave_is_reported_and_the_others_are_exported(filled, tmp_path):
    site, uids, _ = filled
    result = run(site, uids[0], uids[3], uids[4], "--out", str(tmp_path / "out"), code=2)
    assert len(result["exported"]) == 1
    why = " ".join(image["reason"] for image in result["refused"])
    assert "rejected: " in why and "Secondary Capture" in why


def test_of_two_images_under_one_uid_the_second_is_refused_and_does_not_replace_the_first(filled, tmp_path):
    site, uids, _ = filled
    put(site, xray(77, patient="ANNA", sop_uid=uids[0]))
    with site.ledger() as ledger:
        take_in(site, ledger)
    out = tmp_path / "out"
    result = run(site, uids[0], "--out", str(out), code=2)
    assert [copy["image"] for copy in result["exported"]] == [1]
    assert "the same SOP Instance UID" in result["refused"][0]["reason"]
    run(site, "1", "--out", str(tmp_path / "alone"))
    assert [path.read_bytes() for path in out.iterdir()] == [
        path.read_bytes() for path in (tmp_path / "alone").iterdir()
    ]


def test_an_image_whose_original_was_dropped_is_not_exported(filled, tmp_path):
    site, uids, _ = filled
    with site.ledger() as ledger:
        with ledger.transaction():
            ledger.run("INSERT INTO kept_file VALUES (1, 'original', '2000')")
        now = datetime.now(UTC)
        retention.mark_due(ledger, "original", now, timedelta(days=1))
        retention.finish(site, ledger)
    result = run(site, uids[0], "--out", str(tmp_path / "out"), code=2)
    assert f"dropped on {utc(now)[:10]}" in result["refused"][0]["reason"]


def test_an_unknown_uid_or_a_folder_that_is_not_empty_exports_nothing(filled, tmp_path):
    site, uids, _ = filled
    run(site, uids[0], "9.9.9", "--out", str(tmp_path / "out"), code=1)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.dcm").write_bytes(b"")
    run(site, uids[0], "--out", str(tmp_path / "full"), code=1)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["old.dcm"]


def test_the_audit_records_who_exported_which_images(filled, tmp_path):
    site, uids, _ = filled
    with site.ledger() as ledger:
        export.export(site, ledger, uids[:1], tmp_path / "out", False, "Dr Osei")
        entry = audit.tail(ledger, 1)[0]
        assert (entry["who"], entry["what"], entry["after"]["images"]) == ("Dr Osei", "images exported", [1])
        with pytest.raises(Problem, match="not empty"):
            export.export(site, ledger, uids[:1], tmp_path / "out", False, "Dr Osei")
