"""The intake: outcomes, duplicates, ranges, repeated steps; and the import of folders."""

import os
from pathlib import Path

import pytest
from PIL import Image

from agent.errors import Problem
from agent.images import intake, listing
from agent.images.importer import import_folder
from agent.site.splits import fix_shares, range_of
from tests.conftest import make_site
from tests.support.agent.images import InProcessExaminer, pixels, put, save, take_in, xray


def states(site):
    with site.ledger() as ledger:
        return [(row["state"], row["reason"]) for row in listing.newest(site, ledger, None, 100)]


def test_an_image_is_stored_with_its_plate_its_pseudonym_and_its_range(site):
    put(site, xray(1, patient="Doe^John"))
    with site.ledger() as ledger:
        assert take_in(site, ledger) == 1
        row = ledger.rows("SELECT * FROM image")[0]
    assert row["state"] == "stored"
    assert site.store.plate(row["plate"]).shape == (512, 512)
    assert row["range"] in ("golden", "calibration", "validation", "train")
    assert "Doe" not in str(row)
    assert site.inbox.waiting() == []


def test_no_patient_id_is_outside_the_original_file(site):
    put(site, xray(1, patient="SECRETNAME"))
    with site.ledger() as ledger:
        take_in(site, ledger)
    for path in site.root.rglob("*"):
        assert "SECRETNAME" not in path.name
        if path.is_file() and "originals" not in path.parts:
            assert b"SECRETNAME" not in path.read_bytes(), path


def test_a_lateral_is_rejected_and_a_broken_file_quarantined_and_both_are_kept(site):
    put(site, xray(1, view="LL"))
    site.inbox.put(b"not DICOM at all")
    with site.ledger() as ledger:
        take_in(site, ledger)
        rows = ledger.rows("SELECT * FROM image ORDER BY id")
        counters = ledger.counters()
    assert sorted(row["state"] for row in rows) == ["quarantined", "rejected"]
    assert all(row["reason"] and site.store.path(row["original"]).is_file() for row in rows)
    assert (counters["stored"], counters["rejected"], counters["quarantined"]) == (0, 1, 1)


def test_the_same_image_received_twice_is_stored_once(site):
    for _ in range(2):
        put(site, xray(1))
    with site.ledger() as ledger:
        take_in(site, ledger)
        assert ledger.counters()["stored"] == 1
        assert ledger.value("SELECT count(*) FROM notice") == 0


def test_the_same_image_in_another_syntax_is_stored_once_without_notice(site):
    first = xray(1)
    put(site, first)
    put(
        site,
        xray(
            1, transfer_syntax="1.2.840.10008.1.2.4.90", sop_uid=first.SOPInstanceUID, study_uid=first.StudyInstanceUID
        ),
    )
    with site.ledger() as ledger:
        take_in(site, ledger)
        assert ledger.counters()["stored"] == 1
        assert ledger.value("SELECT count(*) FROM notice") == 0


def test_two_images_with_one_uid_and_different_pixels_are_both_kept_with_a_notice(site):
    first = xray(1)
    put(site, first)
    put(site, xray(2, patient="P0001", sop_uid=first.SOPInstanceUID))
    with site.ledger() as ledger:
        take_in(site, ledger)
        assert ledger.counters()["stored"] == 2
        assert ledger.value("SELECT kind FROM notice") == "same UID"


def test_corrected_demographics_supersede_the_older_version(site):
    first = xray(1, patient="WRONG")
    put(site, first)
    put(site, xray(1, patient="RIGHT", sop_uid=first.SOPInstanceUID, study_uid=first.StudyInstanceUID))
    with site.ledger() as ledger:
        take_in(site, ledger)
        old, new = ledger.rows("SELECT * FROM image ORDER BY id")
        assert old["superseded_by"] == new["id"]
        assert ledger.value("SELECT kind FROM notice") == "corrected"


def test_an_old_version_sent_again_in_another_syntax_does_not_undo_its_correction(site):
    old = xray(1)
    same = {"sop_uid": old.SOPInstanceUID, "study_uid": old.StudyInstanceUID}
    put(site, old)
    put(site, xray(1, patient="P0001 corrected", **same))
    put(site, xray(1, transfer_syntax="1.2.840.10008.1.2.4.90", **same))
    with site.ledger() as ledger:
        take_in(site, ledger)
        rows = ledger.rows("SELECT id, superseded_by FROM image ORDER BY id")
    assert len(rows) == 2
    assert [row["superseded_by"] for row in rows] == [rows[1]["id"], None]


def test_a_crash_after_the_row_and_before_the_unlink_changes_nothing(site):
    path = put(site, xray(1))
    with site.ledger() as ledger:
        examined = next(iter(InProcessExaminer(site).examine([path])))[1]
        fix_shares(ledger, site.config.patients)
        assert intake.take_in(site, ledger, path, examined, "2026-01-01T00:00:00Z", receipt=path.name) == "stored"
        assert take_in(site, ledger) == 1  # the file is still in the inbox: taken again
        assert ledger.counters()["stored"] == 1
        assert ledger.value("SELECT outcome FROM receipt") == "stored"


def test_ranges_are_fixed_by_patient_and_follow_the_shares(site):
    key, shares = site.key("pseudonym.key"), site.config.patients
    ranges = [range_of(key, f"p{n:016x}", True, shares) for n in range(2000)]
    assert ranges == [range_of(key, f"p{n:016x}", True, shares) for n in range(2000)]
    assert abs(ranges.count("golden") / 2000 - shares.golden) < 0.04
    assert abs(ranges.count("train") / 2000 - 0.4) < 0.04


def test_an_image_without_patient_id_is_never_golden(site):
    key, shares = site.key("pseudonym.key"), site.config.patients
    assert not any(range_of(key, f"s{n:016x}", False, shares).startswith("golden") for n in range(500))


def test_shares_cannot_change_after_the_first_image(tmp_path):
    site = make_site(tmp_path / "site")
    with site.ledger() as ledger:
        fix_shares(ledger, site.config.patients)
        fix_shares(ledger, site.config.patients)
        with pytest.raises(Problem, match="can't change later"):
            fix_shares(ledger, site.config.patients.model_copy(update={"golden": 0.2}))


def test_an_inbox_file_that_can_not_be_read_stays_and_does_not_block_the_next_file(site):
    unread = site.root / "inbox" / "0.dcm"
    unread.mkdir()  # any error of reading
    os.utime(unread, (0, 0))
    with site.ledger() as ledger, intake.examiner(site) as pool:
        put(site, xray(1))
        assert [intake.step(site, ledger, pool) for _ in range(3)] == [1, 0, 0]
        notices = ledger.rows("SELECT kind, detail FROM notice")
    assert notices == [{"kind": "damaged", "detail": "inbox/0.dcm can't be read and stays there; check the disk"}]
    assert unread.exists()


def test_import_takes_dicom_and_pictures_through_the_same_intake(site, tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    save(xray(1), folder / "a.dcm")
    Image.fromarray(pixels(2)).save(folder / "deep" / "b.png")
    Image.fromarray(pixels(3)).convert("RGB").save(folder / "c.jpg")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "labels.csv").write_text("file,finding,value,patient_id,view\ndeep/b.png,effusion,1,B,AP\n")
    with site.ledger() as ledger:
        first = import_folder(site, ledger, folder, "PA")
        again = import_folder(site, ledger, folder, "PA")
        views = {
            row["file"]: row["view"] for row in ledger.rows("SELECT file, view FROM image WHERE plate IS NOT NULL")
        }
    assert first == {"seen": 4, "stored": 3, "rejected": 0, "quarantined": 1, "duplicate": 0}
    assert again == {"seen": 4, "stored": 0, "rejected": 0, "quarantined": 0, "duplicate": 4}
    assert views == {"a.dcm": "PA", "deep/b.png": "AP", "c.jpg": "PA"}


def test_import_takes_files_whose_names_are_not_utf_8(site, tmp_path):
    """File names of an old archive: ledger and labels.csv can only hold text."""
    folder = tmp_path / "old"
    folder.mkdir()
    save(xray(1), tmp_path / "image.dcm").rename(folder / os.fsdecode(b"caf\xe9.dcm"))
    Image.fromarray(pixels(2)).save(folder / "picture.png")
    (folder / "picture.png").rename(folder / os.fsdecode(b"b\xe4r.png"))
    (folder / "labels.csv").write_text("file,view\nb\\xe4r.png,AP\n", "utf-8")
    with site.ledger() as ledger:
        assert import_folder(site, ledger, folder, "PA")["seen"] == 2
        rows = {row["file"]: row["reason"] or row["view"] for row in listing.newest(site, ledger, None, 10)}
    assert set(rows) == {"caf\\xe9.dcm", "b\\xe4r.png"}
    assert "not a DICOM" not in rows["b\\xe4r.png"]


def test_import_continues_after_a_picture_larger_than_any_image(site, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("1", (20_000, 10_000)).save(folder / "bomb.png")
    save(xray(1), folder / "image.dcm")
    with site.ledger() as ledger:
        counts = import_folder(site, ledger, folder, "PA")
    assert (counts["quarantined"], counts["seen"] - counts["quarantined"]) == (1, 1)


def test_import_names_a_labels_csv_that_is_not_utf_8(site, tmp_path):
    (tmp_path / "labels.csv").write_bytes(b"file,patient_id\nm\xfcller.png,1\n")
    with site.ledger() as ledger, pytest.raises(Problem, match=r"labels.csv: not a CSV in UTF-8"):
        import_folder(site, ledger, tmp_path, "PA")


def test_import_names_an_unreadable_file_after_it_took_all_others(site, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.dcm").symlink_to("/proc/self/mem")  # a file that gives an error of reading, also to root
    xray(1).save_as(tmp_path / "images" / "b.dcm", enforce_file_format=True)
    with site.ledger() as ledger, pytest.raises(Problem, match=r"^1 of 2 files can't be read, the first is a\.dcm"):
        import_folder(site, ledger, tmp_path / "images", "PA")
    with site.ledger() as ledger:
        assert [row["file"] for row in ledger.rows("SELECT file FROM image")] == ["b.dcm"]


def test_import_names_a_missing_folder(site):
    with site.ledger() as ledger, pytest.raises(Problem, match="no such folder"):
        import_folder(site, ledger, Path("/nowhere"), "PA")
