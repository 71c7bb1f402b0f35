"""An image is `returned` when the PACS has all its results; also end to end, with Orthanc as the PACS."""

from datetime import timedelta

import httpx
import pytest

from agent.images import labels, listing
from agent.results import outbox, reporting
from agent.results.rerun import rerun
from agent.service import status
from dicom.client.sender import send
from dicom.phantom.phantom import draw
from dicom.phantom.wrap import wrap
from tests.conftest import make_site
from tests.support.agent.appliance import Appliance, kill
from tests.support.agent.images import put, take_in, xray
from tests.support.agent.models import FINDINGS, InProcessServer, add_model
from tests.support.agent.reporting_site import NOW
from tests.support.dicom.orthanc import Orthanc
from tests.support.dicom.pacs import wait_for
from tests.support.dicom.storage_scp import Archive
from tests.support.ports import free_port

IMAGES = 5


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def scored(tmp_path, port):
    """The ledger of a site whose two images are scored and have nothing sent yet."""
    results = {"sr": True, "sc": True, "destination": f"PACS@127.0.0.1:{port}"}
    site = make_site(tmp_path / "site", site={"findings": list(FINDINGS)}, results=results)
    with site.ledger() as ledger:
        for seed in range(2):
            put(site, xray(seed), f"{seed}.dcm")
        take_in(site, ledger)
        add_model(site, ledger, 1)
        while reporting.score_waiting(site, ledger, InProcessServer(site, ledger)):  # type: ignore[arg-type]
            pass
        yield site, ledger


def states(site, ledger):
    return [row["state"] for row in reversed(listing.newest(site, ledger, None, 10))]


def test_an_image_is_returned_only_when_all_its_results_had_success(scored, port):
    site, ledger = scored
    with Archive(port, verdict=lambda ds: 0xA700 if ds.Modality == "OT" else 0):
        reporting.send_due(site, ledger, reporting.PacsLink(), NOW)
    assert states(site, ledger) == ["predicted", "predicted"]
    assert ledger.counters()["returned"] == 0
    with ledger.transaction():
        ledger.run("UPDATE outbox SET due = '2000'")
    with Archive(port):
        reporting.send_due(site, ledger, reporting.PacsLink(), NOW)
    assert states(site, ledger) == ["returned", "returned"]
    answer = status.status(site, ledger)
    assert (answer["ingest"]["returned"], answer["ingest"]["predicted"]) == (2, 2)
    assert answer["outbox"] == {"waiting": 0, "failed": 0, "oldest": None}


def test_a_labelled_image_stays_labelled_and_counts_as_returned_once(scored, port, tmp_path):
    site, ledger = scored
    sop_uid = ledger.value("SELECT sop_uid FROM image WHERE id = 1")
    (tmp_path / "labels.csv").write_text(f"sop_uid,finding,value\n{sop_uid},{FINDINGS[0]},1\n")
    labels.import_csv(site, ledger, tmp_path / "labels.csv", "test")
    with Archive(port):
        reporting.send_due(site, ledger, reporting.PacsLink(), NOW)
        assert states(site, ledger) == ["labelled", "returned"]
        first = ledger.value("SELECT returned_at FROM image WHERE id = 1")
        rerun(ledger, "1", None, False, "test")
        reporting.score_waiting(site, ledger, InProcessServer(site, ledger))  # type: ignore[arg-type]
        assert outbox.state(ledger)["waiting"] == 2
        assert reporting.send_due(site, ledger, reporting.PacsLink(), NOW + timedelta(days=1)) == 2
    assert ledger.counters()["returned"] == 2
    assert ledger.value("SELECT returned_at FROM image WHERE id = 1") == first


@pytest.mark.parametrize("left", [None, b"", b"no array"])
def test_an_image_without_its_plate_is_reported_and_the_next_is_scored(tmp_path, left):
    site = make_site(tmp_path / "site", site={"findings": list(FINDINGS)})
    with site.ledger() as ledger:
        for seed in range(2):
            put(site, xray(seed), f"{seed}.dcm")
        take_in(site, ledger)
        add_model(site, ledger, 1)
        plate = site.store.path(ledger.value("SELECT plate FROM image WHERE id = 1"))
        whole = plate.read_bytes()
        plate.unlink()
        if left is not None:
            plate.write_bytes(left)
        assert reporting.score_waiting(site, ledger, InProcessServer(site, ledger)) == 2  # type: ignore[arg-type]
        assert states(site, ledger) == ["stored", "predicted"]
        (alert,) = [entry["detail"] for entry in status.status(site, ledger)["alerts"] if entry["kind"] == "damaged"]
        assert "image 1" in alert and "images rerun 1" in alert
        plate.write_bytes(whole)
        rerun(ledger, "1", None, False, "a test")
        reporting.score_waiting(site, ledger, InProcessServer(site, ledger))  # type: ignore[arg-type]
        assert states(site, ledger) == ["predicted", "predicted"]


def test_an_image_with_a_refused_result_is_not_returned(scored, port):
    site, ledger = scored
    with Archive(port, verdict=lambda ds: 0xA900 if ds.Modality == "SR" else 0):
        reporting.send_due(site, ledger, reporting.PacsLink(), NOW)
    assert states(site, ledger) == ["predicted", "predicted"]
    assert outbox.state(ledger) == {"waiting": 0, "failed": 2, "oldest": None}


@pytest.mark.peer("orthanc")
def test_a_late_orthanc_gets_everything_once_despite_kills_and_our_own_results_are_rejected(tmp_path):
    node = free_port()
    orthanc = Orthanc(tmp_path / "orthanc", port=node)
    site = make_site(
        tmp_path / "site",
        site={"findings": list(FINDINGS)},
        node={"port": node},
        results={"sr": True, "sc": True, "destination": orthanc.peer},
    )
    with site.ledger() as ledger:
        add_model(site, ledger, 1)
    sent = [wrap(phantom.pixels(), phantom.patient, phantom.view) for phantom in draw(IMAGES, 5, repeat=0)]
    with Appliance(site) as appliance, site.ledger() as ledger:
        assert [code for _, code in send(sent, "127.0.0.1", node, "CXRLOOP")] == [0] * IMAGES
        assert wait_for(lambda: ledger.counters()["predicted"] == IMAGES, 60)
        assert outbox.state(ledger)["waiting"] == 2 * IMAGES
        kill(appliance.children()["learn"])
        with orthanc:
            assert wait_for(lambda: count(orthanc) > 0, 60)
            kill(appliance.children()["learn"])  # in the middle of it
            assert wait_for(lambda: ledger.counters()["returned"] == IMAGES, 60)
            assert count(orthanc) == 2 * IMAGES
            assert states(site, ledger) == ["returned"] * IMAGES
            assert studies_of(orthanc) == {str(dataset.StudyInstanceUID): {"SR", "OT"} for dataset in sent}
            instances = httpx.get(orthanc.url + "/instances").json()
            for instance in instances:  # our node accepts no reports; it takes captures and rejects them as our own
                httpx.post(f"{orthanc.url}/modalities/node/store", content=instance, timeout=30)
            assert wait_for(lambda: ledger.counters()["rejected"] == IMAGES, 60)
            refused = listing.newest(site, ledger, "rejected", 10)
            assert {row["reason"].split(": ")[1] for row in refused} == {"one of our own results"}
            assert (ledger.counters()["predicted"], outbox.state(ledger)["waiting"]) == (IMAGES, 0)


def count(orthanc):
    return httpx.get(orthanc.url + "/statistics").json()["CountInstances"]


def studies_of(orthanc):
    """Study Instance UIDs and the modalities of their series."""
    return {
        study["MainDicomTags"]["StudyInstanceUID"]: {
            httpx.get(f"{orthanc.url}/series/{series}").json()["MainDicomTags"]["Modality"]
            for series in study["Series"]
        }
        for study in httpx.get(orthanc.url + "/studies?expand").json()
    }
