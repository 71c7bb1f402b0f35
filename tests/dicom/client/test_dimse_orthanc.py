"""Asking Orthanc as the real thing, over C-GET, C-MOVE and DICOMweb."""

from datetime import date

import pytest
from pydicom import dcmread

from dicom.client import dicomweb
from dicom.client.archive import Query
from dicom.client.association import Peer
from dicom.client.dimse import Pacs
from dicom.dataset.part10 import EXPLICIT_BE, EXPLICIT_LE, IMPLICIT_LE
from dicom.dataset.syntaxes import JPEG_2000_LOSSLESS, JPEG_LS
from dicom.errors import ArchiveUnusable, ImageMissing
from tests.support.dicom.archive_queries import receiving
from tests.support.dicom.orthanc import Orthanc
from tests.support.dicom.pacs import data_set, xray


@pytest.fixture
def node(tmp_path):
    with receiving(tmp_path) as listening:
        yield listening


@pytest.fixture
def orthanc(node, tmp_path):
    with Orthanc(tmp_path / "orthanc", port=node[0].port) as server:
        yield server


def ways(orthanc, inbox):
    peer = Peer("ORTHANC", "127.0.0.1", orthanc.port)
    return {"get": Pacs(peer, inbox, "get"), "move": Pacs(peer, inbox, "move"), "web": dicomweb.Web(orthanc.web, inbox)}


def pull(asked, wanted):
    """All images of all studies that match."""
    asked.check_connection()
    studies, whole = asked.studies(wanted)
    assert whole
    images = []
    for study in studies:
        with asked.session() as session:
            for one in session.images(study.uid, wanted):
                session.fetch(one)
                images.append(one.sop_uid)
    return images


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_images_come_byte_for_byte_in_the_syntax_they_are_kept_in(node, orthanc, how):
    _, inbox = node
    images = [
        xray(n, bits=12, transfer_syntax=syntax)
        for n, syntax in enumerate((EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, JPEG_LS, JPEG_2000_LOSSLESS))
    ]
    orthanc.hold(*images)
    assert len(pull(ways(orthanc, inbox)[how], Query(patient="P1"))) == len(images)
    came = {dcmread(path).SOPInstanceUID: path for path in inbox.waiting()}
    for one in images:
        path = came[one.SOPInstanceUID]
        assert dcmread(path).file_meta.TransferSyntaxUID == one.file_meta.TransferSyntaxUID
        assert path.read_bytes().endswith(data_set(one))


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_only_the_chest_images_of_a_mixed_study_are_asked_for(node, orthanc, how):
    _, inbox = node
    uid = "1.2.3.4"
    mine = xray(1, study_uid=uid, study_date="20260105", modality="CR")
    knee, ct = (
        xray(2, study_uid=uid, study_date="20260105", body_part="KNEE"),
        xray(3, study_uid=uid, study_date="20260105"),
    )
    for n, one in enumerate((mine, knee, ct)):
        one.SeriesInstanceUID = f"{uid}.{n}"
    ct.SOPClassUID = ct.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    ct.Modality = "CT"
    other = xray(4, study_date="20260106")
    orthanc.hold(mine, knee, ct, other)
    day = date(2026, 1, 5)
    assert pull(ways(orthanc, inbox)[how], Query(since=day, until=day)) == [mine.SOPInstanceUID]
    assert len(inbox.waiting()) == 1


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_nothing_is_found_and_that_is_no_error(node, orthanc, how):
    assert pull(ways(orthanc, node[1])[how], Query(study="1.2.3.4.5.6")) == []


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_an_image_that_is_gone_between_list_and_fetch_is_missing_and_the_next_one_comes(node, orthanc, how):
    _, inbox = node
    uid = "1.2.3.4"
    images = [xray(n, study_uid=uid) for n in range(2)]
    orthanc.hold(*images)
    with ways(orthanc, inbox)[how].session() as session:
        listed = session.images(uid, Query())
        orthanc.drop(images[0])
        gone, there = sorted(listed, key=lambda one: one.sop_uid != images[0].SOPInstanceUID)
        with pytest.raises(ImageMissing):
            session.fetch(gone)
        session.fetch(there)
    assert [dcmread(path).SOPInstanceUID for path in inbox.waiting()] == [images[1].SOPInstanceUID]


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
def test_a_destination_that_the_archive_does_not_know_is_named(node, tmp_path):
    with Orthanc(tmp_path / "orthanc", aet="OTHER") as server:
        server.hold(xray(study_uid="1.2.3.4"))
        asked = Pacs(Peer("ORTHANC", "127.0.0.1", server.port), node[1], "move")
        with asked.session() as session:
            (one,) = session.images("1.2.3.4", Query())
            with pytest.raises((ArchiveUnusable, ImageMissing), match="CXRLOOP"):
                session.fetch(one)
