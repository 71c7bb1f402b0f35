"""Report and heatmap of a scored image: patient, content, validity, and rejection at our own intake."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from cxrloop.plate import PLATE_SIDE as SIDE
from dicom.dataset.facts import RESULT_UID_ROOT
from dicom.dataset.syntaxes import JPEG_BASELINE
from dicom.errors import HeaderIncomplete
from dicom.intake.admission import Admission
from dicom.intake.examine import examine
from dicom.outgoing.codes import SCHEME, finding_code, own_code
from dicom.outgoing.results import NOTICE, Score, Scored, character_set, read_image, result_uid
from dicom.outgoing.secondary_capture import STRIP, capture, sheet
from dicom.outgoing.structured_report import report
from tests.support.dicom.pacs import KEY, save, xray
from tests.support.dicom.storage_scp import text_of

ROOT = Path(__file__).resolve().parents[3]
SCORES = (Score("effusion", 0.8312, 0.41), Score("a finding of this site", 0.02, 0.3), Score("opacity", 1e-7, 0.5))
AT = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
SCORED = Scored("ab" * 32, "0123456789ab", SCORES, AT, "d" * 64, "0.1.0")
PANELS = [(score, np.full((SIDE, SIDE, 3), 60, np.uint8)) for score in SCORES[:1]]


def elements(ds: Dataset, **raw: bytes | None) -> bytes:
    """Return the image as a file whose elements have exactly these bytes, valid or not; None removes one."""
    from pydicom.datadict import dictionary_VR, keyword_dict
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    kept = Dataset()
    kept.file_meta = ds.file_meta
    for element in ds:
        kept.add(element)
    for keyword, value in raw.items():
        tag = Tag(keyword_dict[keyword])
        kept.pop(tag, None)
        if value is not None:
            padded = value + b" " * (len(value) % 2)
            kept[tag] = RawDataElement(tag, dictionary_VR(tag), len(padded), padded, 0, False, True)
    from io import BytesIO

    from pydicom.charset import convert_encodings

    kept.set_original_encoding(False, True, convert_encodings(kept.get("SpecificCharacterSet") or None))
    buffer = BytesIO()
    kept.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def header_of(tmp_path, **raw: bytes | None) -> Dataset:
    path = tmp_path / "image.dcm"
    path.write_bytes(elements(xray(), **raw))
    return read_image(path)


def test_results_are_in_the_study_of_the_image_each_in_its_own_series(tmp_path):
    source = xray(patient_id="P7", study_date="20260102", sex="F", age_years=50)
    source.PatientName, source.AccessionNumber, source.StudyID = "Müller^Jörg", "A1", "S1"
    path = save(source, tmp_path / "image.dcm")
    results = [report(read_image(path), SCORED), capture(read_image(path), SCORED, PANELS)]
    made = [dcmread(save(ds, tmp_path / "out.dcm")) for ds in results]
    for ds in made:
        for keyword in (
            "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName", "PatientID",
            "PatientName", "PatientSex", "PatientAge", "PatientBirthDate", "SpecificCharacterSet",
        ):  # fmt: skip
            assert ds[keyword].value == source[keyword].value, keyword
        assert ds.SOPInstanceUID.startswith(RESULT_UID_ROOT)
        assert ds.SeriesInstanceUID.startswith(RESULT_UID_ROOT)
        assert ds.ManufacturerModelName == "cxrloop"
        assert (ds.ContentDate, ds.ContentTime) == ("20260304", "050607")
    uids = {uid for ds in made for uid in (ds.SOPInstanceUID, ds.SeriesInstanceUID)}
    assert len(uids) == 4
    assert source.SeriesInstanceUID not in uids


def test_the_report_has_bundle_finding_probability_threshold_and_notice(tmp_path):
    result = report(header_of(tmp_path), SCORED)
    assert result.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    texts = text_of(result)
    assert {"Pleural effusion", "a finding of this site", "Opacity", "0.8312", "0.41", "Yes", "No"} <= set(texts)
    assert "bundle 0123456789ab" in texts
    assert sum(NOTICE in text for text in texts) == len(SCORES) + 1
    assert (result.CompletionFlag, result.VerificationFlag, result.PreliminaryFlag) == (
        "COMPLETE",
        "UNVERIFIED",
        "PRELIMINARY",
    )


def test_report_and_capture_refer_to_the_image(tmp_path):
    source = header_of(tmp_path)
    evidence = report(source, SCORED).CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert evidence.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert evidence.SeriesInstanceUID == source.SeriesInstanceUID
    referred = capture(source, SCORED, PANELS).SourceImageSequence[0]
    assert referred.ReferencedSOPInstanceUID == source.SOPInstanceUID


def test_a_retry_makes_the_same_bytes_and_another_bundle_another_object(tmp_path):
    source = header_of(tmp_path)
    for make in (report, lambda f, s: capture(f, s, PANELS)):
        first, again = (save(make(source, SCORED), tmp_path / name) for name in ("1.dcm", "2.dcm"))
        assert first.read_bytes() == again.read_bytes()
        by_next_bundle = Scored("ab" * 32, "ffffffffffff", SCORES, AT, "d" * 64, "0.1.0")
        assert make(source, by_next_bundle).SOPInstanceUID != make(source, SCORED).SOPInstanceUID
    assert len({SCORED.uid(*words) for words in (("sr",), ("sc",), ("sr", "series"), ("sc", "series"))}) == 4
    assert all(len(result_uid(str(n))) <= 64 for n in range(200))


@pytest.mark.parametrize("kind", ["sr", "sc"])
def test_our_own_results_are_rejected_when_they_are_received(tmp_path, kind):
    source = header_of(tmp_path)
    result = report(source, SCORED) if kind == "sr" else capture(source, SCORED, PANELS)
    examined = examine(save(result, tmp_path / "back.dcm"), KEY, Admission())
    assert examined.outcome == "rejected"
    assert "one of our own results" in (examined.reason or "")
    result.ManufacturerModelName = "a router"
    examined = examine(save(result, tmp_path / "rebadged.dcm"), KEY, Admission())
    assert "one of our own results" in (examined.reason or "")
    result.ManufacturerModelName = "CXRLOOP"
    result.SOPInstanceUID = result.file_meta.MediaStorageSOPInstanceUID = "1.2.3"  # a router gave it a new UID
    examined = examine(save(result, tmp_path / "renamed.dcm"), KEY, Admission())
    assert "one of our own results" in (examined.reason or "")


def test_the_sheet_shows_each_panel_with_its_caption_and_the_notice_below():
    single, four = sheet(PANELS, SCORED), sheet(PANELS * 4, SCORED)
    assert single.shape == (SIDE + 3 * STRIP, SIDE, 3)
    assert four.shape == (2 * SIDE + 4 * STRIP, 2 * SIDE, 3)
    assert (single[:SIDE] == 60).all()
    for strip in range(3):
        assert single[SIDE + strip * STRIP : SIDE + (strip + 1) * STRIP].max() > 200
    long = [(Score("W" * 64, 0.5, 0.5), PANELS[0][1])]
    caption = sheet(long, SCORED)[SIDE : SIDE + STRIP]
    assert (caption[:, -8:] == 0).all()
    likelier = sheet([(Score("W" * 64, 0.7, 0.5), PANELS[0][1])], SCORED)[SIDE : SIDE + STRIP]
    assert not np.array_equal(caption, likelier)  # a long name is shortened, the figures never


def test_a_finding_without_a_standard_code_has_one_of_the_declared_scheme(tmp_path):
    assert finding_code("Pleural_Effusion").scheme_designator == "SCT"
    mine = finding_code("a finding of this site")
    assert (mine.scheme_designator, mine.meaning) == (SCHEME, "a finding of this site")
    assert len(mine.value) <= 16
    assert finding_code("a finding of that site").value != mine.value
    assert own_code("short", "x").value == "short"
    declared = report(header_of(tmp_path), SCORED).CodingSchemeIdentificationSequence
    assert [item.CodingSchemeDesignator for item in declared] == [SCHEME]


def test_invalid_patient_attributes_are_emptied_and_identifying_ones_stay(tmp_path):
    absent = dict.fromkeys(("PatientName", "PatientSex", "StudyID", "AccessionNumber", "StudyDate", "PatientBirthDate"))
    assert report(header_of(tmp_path, **absent), SCORED)["StudyID"].value in ("", b"", None)
    wrong = {
        "PatientSex": b"FEMALE", "PatientBirthDate": b"unknown", "StudyDate": b"2026.01.02", "StudyTime": b"12:30:59",
        "PatientAge": b"55", "PatientWeight": b"seventy", "StudyID": b"S" * 40, "StudyDescription": b"a\\b",
        "AccessionNumber": b"A" * 20,
    }  # fmt: skip
    made = dcmread(save(report(header_of(tmp_path, **wrong), SCORED), tmp_path / "out.dcm"))
    assert (made.PatientSex, made.PatientBirthDate, made.StudyID) == ("", "", "")
    assert (made.StudyDate, made.StudyTime, made.AccessionNumber) == ("20260102", "123059", "A" * 20)
    assert not {"PatientAge", "PatientWeight", "StudyDescription"} & set(made.dir())


def test_an_image_without_a_series_uid_raises_header_incomplete(tmp_path):
    with pytest.raises(HeaderIncomplete, match="SeriesInstanceUID"):
        report(header_of(tmp_path, SeriesInstanceUID=None), SCORED)


def test_times_use_the_utc_offset_of_the_image(tmp_path):
    there = report(header_of(tmp_path, TimezoneOffsetFromUTC=b"+0530"), SCORED)
    assert (there.ContentTime, there.TimezoneOffsetFromUTC) == ("103607", "+0530")
    vienna = Scored("ab" * 32, "0123456789ab", SCORES, AT.astimezone(timezone(timedelta(hours=1))), "d" * 64, "0.1.0")
    here = report(header_of(tmp_path), vienna)
    assert here.ContentTime == "060607"
    assert "TimezoneOffsetFromUTC" not in here


KANJI = "Yamada^Tarou=山田^太郎=やまだ^たろう"
NAMES = {  # declared character set, bytes, name as a reader of the result must see it
    "ASCII": (b"ISO_IR 100", b"Doe^Jane", "Doe^Jane"),
    "Latin-1": (b"ISO_IR 100", "Müller^Jörg".encode("latin-1"), "Müller^Jörg"),
    "UTF-8": (b"ISO_IR 192", "Müller^Jörg".encode(), "Müller^Jörg"),
    "Greek": (b"ISO_IR 126", "Διονυσιος".encode("iso8859-7"), "Διονυσιος"),
    "Japanese": (b"\\ISO 2022 IR 87", KANJI.encode("iso2022_jp"), KANJI),
    "Chinese": (b"GB18030", "Wang^XiaoDong=王^小东".encode("gb18030"), "Wang^XiaoDong=王^小东"),
    "Latin-1, not declared": (None, "Müller^Jörg".encode("latin-1"), "Müller^Jörg"),
    "UTF-8, not declared": (None, "Müller^Jörg".encode(), "Müller^Jörg"),
    "Latin-1, declared as UTF-8": (b"ISO_IR 192", "Müller^Jörg".encode("latin-1"), "Müller^Jörg"),
    "a character set that is none": (b"UTF8", "Müller^Jörg".encode(), "Müller^Jörg"),
    "no name, no character set": (None, None, ""),
    "Chinese, as GBK": (b"GBK", "Wang^XiaoDong=王^小东".encode("gbk"), "Wang^XiaoDong=王^小东"),
    "Cyrillic, misspelt": (b"ISO-IR 144", "Люкcемб".encode("iso8859_5"), "Люкcемб"),
    "Japanese, misspelt": (b"\\ISO_2022_IR_87", KANJI.encode("iso2022_jp"), KANJI),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_keep_their_bytes_and_are_decoded_correctly(tmp_path, case):
    charset, name, seen = NAMES[case]
    source = header_of(tmp_path, SpecificCharacterSet=charset, PatientName=name)
    for number, result in enumerate((report(source, SCORED), capture(source, SCORED, PANELS))):
        path = save(result, tmp_path / f"{number}.dcm")
        assert (name or b"") in path.read_bytes()
        assert str(dcmread(path).PatientName) == seen


def test_the_images_character_set_is_kept_where_it_fits(tmp_path):
    for charset, name, _ in list(NAMES.values())[:6]:
        source = header_of(tmp_path, SpecificCharacterSet=charset, PatientName=name)
        assert "\\".join(character_set(source)) == charset.decode()
    assert character_set(header_of(tmp_path, SpecificCharacterSet=None)) == ()


def test_text_length_counts_characters_not_bytes(tmp_path):
    for charset, codec in ((b"\\ISO 2022 IR 87", "iso2022_jp"), (b"GB18030", "gb18030"), (b"ISO_IR 192", "utf-8")):
        for length, kept in ((64, True), (65, False)):
            text = ("胸" * length).encode(codec)
            made = report(header_of(tmp_path, SpecificCharacterSet=charset, StudyDescription=text), SCORED)
            assert ("StudyDescription" in made) == kept, (charset, length)


def test_a_heatmap_of_a_lossy_image_is_marked_lossy(tmp_path):
    assert capture(header_of(tmp_path, LossyImageCompression=b"01"), SCORED, PANELS).LossyImageCompression == "01"
    assert "LossyImageCompression" not in capture(header_of(tmp_path, LossyImageCompression=b"00"), SCORED, PANELS)
    silent = xray()
    del silent.LossyImageCompression
    silent.file_meta.TransferSyntaxUID = JPEG_BASELINE
    silent.PixelData, silent["PixelData"].VR = encapsulate([b"not read"]), "OB"
    made = capture(read_image(save(silent, tmp_path / "jpeg.dcm")), SCORED, PANELS)
    assert made.LossyImageCompression == "01"  # although the header does not declare it


ODD = {
    **{case: {"SpecificCharacterSet": charset, "PatientName": name} for case, (charset, name, _) in NAMES.items()},
    "nobody": dict.fromkeys(
        ("PatientName", "PatientID", "PatientSex", "PatientBirthDate", "StudyID", "AccessionNumber", "StudyDate",
         "StudyTime", "ReferringPhysicianName", "Manufacturer", "PatientOrientation")
    ),
    "wrong values": {
        "PatientSex": b"FEMALE", "PatientBirthDate": b"unknown", "StudyDate": b"2026.01.02", "StudyTime": b"12:30:59",
        "PatientAge": b"55", "PatientWeight": b"seventy", "PatientSize": b"1,80", "StudyID": b"S" * 40,
        "StudyDescription": b"a\\b", "EthnicGroup": b"x" * 20, "PatientOrientation": b"LEFT\\FOOT",
    },
    "an offset from UTC": {"TimezoneOffsetFromUTC": b"-0330"},
    "three names": {"PatientName": b"x\\y\\z"},
    "seven parts of a name": {"PatientName": b"A^B^C^D^E^F^G"},
    "a name longer than names are": {"PatientName": b"N" * 80, "ReferringPhysicianName": b"R" * 65},
    "four spellings of a name": {"PatientName": b"a=b=c=d"},
    "letters burned in": {"BurnedInAnnotation": b"YES"},
}  # fmt: skip


@pytest.mark.peer("dicom3tools")
@pytest.mark.parametrize("case", ODD)
def test_dciodvfy_finds_no_errors_also_for_odd_originals(tmp_path, case):
    source = header_of(tmp_path, **ODD[case])
    for result in (report(source, SCORED), capture(source, SCORED, PANELS)):
        path = save(result, tmp_path / "out.dcm")
        done = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, timeout=60)
        lines = (done.stdout + done.stderr).decode(errors="replace").splitlines()
        assert [line for line in lines if line.startswith("Error")] == []


@pytest.mark.peer("dcmtk")
def test_dcmtk_reads_the_report_as_a_valid_structured_report(tmp_path):
    path = save(report(header_of(tmp_path), SCORED), tmp_path / "out.dcm")
    done = subprocess.run(["dsrdump", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Pleural effusion" in done.stdout


def test_no_library_prints_a_uid_or_a_name_into_the_log_while_a_result_is_made(tmp_path):
    header_of(
        tmp_path, StudyInstanceUID=b"1.2.003.4", PatientName=b"Secret^" + b"x" * 80, PatientID=b"Secret" + b"y" * 70
    )
    code = (
        "import logging; from pathlib import Path; logging.basicConfig(level='INFO')\n"
        "from agent.cli import main as cli; from dicom.outgoing.structured_report import report; from dicom.client.sender import _Image\n"
        "from dicom.outgoing.results import Score, Scored, read_image; from datetime import datetime, UTC\n"
        "scored = Scored('ab', 'b', (Score('effusion', .5, .5),), datetime.now(UTC), 'd', '0')\n"
        f"cli.app = lambda **_: _Image(report(read_image(Path({str(tmp_path / 'image.dcm')!r})), scored)); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
