"""Query and retrieve from a real Orthanc, over C-GET, C-MOVE and DICOMweb."""

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
from tests.support.dicom.archive_queries import running_listener
from tests.support.dicom.orthanc import Orthanc
from tests.support.dicom.pacs import data_set, xray


@pytest.fixture
def node(tmp_path):
    with running_listener(tmp_path) as listening:
        yield listening


@pytest.fixture
def orthanc(node, tmp_path):
    with Orthanc(tmp_path / "orthanc", port=node[0].port) as server:
        yield server


def archives(orthanc, inbox):
    peer = Peer("ORTHANC", "127.0.0.1", orthanc.port)
    return {"get": Pacs(peer, inbox, "get"), "move": Pacs(peer, inbox, "move"), "web": dicomweb.Web(orthanc.web, inbox)}


def pull(archive, query):
    """Fetch all images of all matching studies and return their UIDs."""
    archive.check_connection()
    studies, complete = archive.studies(query)
    assert complete
    images = []
    for study in studies:
        with archive.session() as session:
            for image in session.images(study.uid, query):
                session.fetch(image)
                images.append(image.sop_uid)
    return images


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_images_arrive_byte_for_byte_in_their_stored_syntax(node, orthanc, how):
    _, inbox = node
    images = [
        xray(n, bits=12, transfer_syntax=syntax)
        for n, syntax in enumerate((EXPLICIT_LE, IMPLICIT_LE, EXPLICIT_BE, JPEG_LS, JPEG_2000_LOSSLESS))
    ]
    orthanc.add(*images)
    assert len(pull(archives(orthanc, inbox)[how], Query(patient="P1"))) == len(images)
    came = {dcmread(path).SOPInstanceUID: path for path in inbox.waiting()}
    for image in images:
        path = came[image.SOPInstanceUID]
        assert dcmread(path).file_meta.TransferSyntaxUID == image.file_meta.TransferSyntaxUID
        assert path.read_bytes().endswith(data_set(image))


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_only_the_chest_images_of_a_mixed_study_are_fetched(node, orthanc, how):
    _, inbox = node
    uid = "1.2.3.4"
    mine = xray(1, study_uid=uid, study_date="20260105", modality="CR")
    knee, ct = (
        xray(2, study_uid=uid, study_date="20260105", body_part="KNEE"),
        xray(3, study_uid=uid, study_date="20260105"),
    )
    for n, image in enumerate((mine, knee, ct)):
        image.SeriesInstanceUID = f"{uid}.{n}"
    ct.SOPClassUID = ct.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    ct.Modality = "CT"
    other_day = xray(4, study_date="20260106")
    orthanc.add(mine, knee, ct, other_day)
    day = date(2026, 1, 5)
    assert pull(archives(orthanc, inbox)[how], Query(since=day, until=day)) == [mine.SOPInstanceUID]
    assert len(inbox.waiting()) == 1


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_no_match_is_not_an_error(node, orthanc, how):
    assert pull(archives(orthanc, node[1])[how], Query(study="1.2.3.4.5.6")) == []


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_an_image_deleted_between_list_and_fetch_is_missing_and_the_next_is_fetched(node, orthanc, how):
    _, inbox = node
    uid = "1.2.3.4"
    images = [xray(n, study_uid=uid) for n in range(2)]
    orthanc.add(*images)
    with archives(orthanc, inbox)[how].session() as session:
        listed = session.images(uid, Query())
        orthanc.remove(images[0])
        removed, present = sorted(listed, key=lambda image: image.sop_uid != images[0].SOPInstanceUID)
        with pytest.raises(ImageMissing):
            session.fetch(removed)
        session.fetch(present)
    assert [dcmread(path).SOPInstanceUID for path in inbox.waiting()] == [images[1].SOPInstanceUID]


@pytest.mark.peer("orthanc", "orthanc-dicomweb")
def test_an_unknown_destination_is_named(node, tmp_path):
    with Orthanc(tmp_path / "orthanc", aet="OTHER") as server:
        server.add(xray(study_uid="1.2.3.4"))
        archive = Pacs(Peer("ORTHANC", "127.0.0.1", server.port), node[1], "move")
        with archive.session() as session:
            (image,) = session.images("1.2.3.4", Query())
            with pytest.raises((ArchiveUnusable, ImageMissing), match="CXRLOOP"):
                session.fetch(image)
