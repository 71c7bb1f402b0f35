"""Interoperation with other programs: dcmtk, Orthanc, dciodvfy."""

import json
import shutil
import subprocess
import urllib.error
import urllib.request

import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file

from dicom.client.sender import echo, send
from dicom.dataset.syntaxes import JPEG_2000_LOSSLESS, JPEG_LS
from dicom.intake.examine import Admission, examine
from dicom.node.listener import Listener, Node
from dicom.store.inbox import Inbox
from tests.support.dicom.pacs import KEY, save, wait_for, xray
from tests.support.ports import free_port

pytestmark = pytest.mark.peer


@pytest.fixture
def node(tmp_path):
    inbox = Inbox(tmp_path / "inbox", 0)
    listener = Listener(Node(port=0), inbox)
    listener.start()
    yield listener, inbox
    listener.stop()


def call(*command, code=0):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def examined(inbox):
    return [examine(path, KEY, Admission()) for path in inbox.waiting()]


# dcmtk


def test_echoscu_is_answered_and_a_wrong_title_is_not(node):
    listener, _ = node
    call("echoscu", "-aec", "CXRLOOP", "127.0.0.1", listener.port)
    assert "Called AE Title Not Recognized" in call("echoscu", "-aec", "WRONG", "127.0.0.1", listener.port, code=1)


def test_dcmsend_sends_images_of_mixed_syntaxes(node, tmp_path):
    listener, inbox = node
    images = [
        save(xray(n, bits=12, transfer_syntax=syntax), tmp_path / f"{n}.dcm")
        for n, syntax in enumerate(("1.2.840.10008.1.2.1", JPEG_LS, JPEG_2000_LOSSLESS, "1.2.840.10008.1.2"))
    ]
    call("dcmsend", "-dn", "-aec", "CXRLOOP", "127.0.0.1", listener.port, *images)
    assert [result.outcome for result in examined(inbox)] == ["admitted"] * 4
    syntaxes = {dcmread(path).file_meta.TransferSyntaxUID for path in inbox.waiting()}
    assert {JPEG_LS, JPEG_2000_LOSSLESS} <= syntaxes


@pytest.mark.parametrize("option", ["-x=", "-xe", "-xb", "-xi", "-xd"])
def test_storescu_in_every_native_syntax_gives_one_pixel_hash(node, tmp_path, option):
    listener, inbox = node
    path = save(xray(3, bits=12), tmp_path / "image.dcm")
    call("storescu", option, "-aec", "CXRLOOP", "127.0.0.1", listener.port, path)
    (result,) = examined(inbox)
    assert result.image.pixel_sha256 == examine(path, KEY, Admission()).image.pixel_sha256


def test_a_real_image_arrives_whole_from_storescu_with_small_pdus(node):
    listener, inbox = node
    path = get_testdata_file("RG1_UNCR.dcm", download=False)
    call("storescu", "-pdu", 4096, "-aec", "CXRLOOP", "127.0.0.1", listener.port, path)
    assert inbox.waiting()[0].stat().st_size > 7_000_000
    assert examined(inbox)[0].image.rows == 1955


def test_an_abort_by_storescu_leaves_no_partial_file(node, tmp_path):
    listener, inbox = node
    path = save(xray(), tmp_path / "image.dcm")
    call("storescu", "--abort", "-aec", "CXRLOOP", "127.0.0.1", listener.port, path)
    assert [result.outcome for result in examined(inbox)] == ["admitted"]
    assert list((inbox.folder / ".tmp").iterdir()) == []
    assert echo("127.0.0.1", listener.port, "CXRLOOP")


def test_termscu_does_not_shut_the_node_down(node):
    listener, _ = node
    subprocess.run(["termscu", "-aec", "CXRLOOP", "127.0.0.1", str(listener.port)], capture_output=True, timeout=30)
    assert echo("127.0.0.1", listener.port, "CXRLOOP")


TRANSCODED = {
    **{f"JPEG lossless, predictor {n}": ("dcmcjpeg", "+el", "+sv", n) for n in range(1, 8)},
    "JPEG lossless SV1": ("dcmcjpeg", "+e1"),
    "JPEG-LS": ("dcmcjpls", "+el"),
    "RLE": ("dcmcrle",),
    "big endian": ("dcmconv", "+tb"),
    "implicit": ("dcmconv", "+ti"),
    "deflated": ("dcmconv", "+td"),
    "undefined lengths": ("dcmconv", "-e"),
}


@pytest.mark.parametrize("name", TRANSCODED)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_dcmtks_lossless_encoders_keep_the_pixel_hash_and_the_plate(tmp_path, name, bits):
    source = save(xray(5, side=131, bits=bits), tmp_path / "source.dcm")
    program, *options = TRANSCODED[name]
    call(program, *options, source, tmp_path / "image.dcm")
    before, after = (examine(tmp_path / f"{stem}.dcm", KEY, Admission()) for stem in ("source", "image"))
    assert after.outcome == "admitted", after.reason
    assert after.image.pixel_sha256 == before.image.pixel_sha256
    assert (after.plate == before.plate).all()


@pytest.mark.parametrize(("options", "bits"), [(("+eb",), 8), (("+ee",), 8), (("+ee",), 12)])
def test_dcmtks_lossy_jpeg_is_decoded_as_dcmtk_decodes_it(tmp_path, options, bits):
    source = save(xray(5, side=131, bits=bits), tmp_path / "source.dcm")
    call("dcmcjpeg", *options, "+un", source, tmp_path / "image.dcm")
    call("dcmdjpeg", tmp_path / "image.dcm", tmp_path / "plain.dcm")
    ours, theirs = (examine(tmp_path / f"{stem}.dcm", KEY, Admission()) for stem in ("image", "plain"))
    assert (ours.outcome, theirs.outcome) == ("admitted", "admitted")
    assert abs(ours.plate.astype(int) - theirs.plate).max() <= 2


def test_our_sender_is_understood_by_storescp(tmp_path):
    port, folder = free_port(), tmp_path / "pacs"
    folder.mkdir()
    pacs = subprocess.Popen(["storescp", "-od", str(folder), "+xa", "+B", "-aet", "PACS", str(port)])
    try:
        assert wait_for(lambda: echo("127.0.0.1", port, "PACS"))
        images = [xray(n, transfer_syntax=syntax) for n, syntax in enumerate((JPEG_LS, "1.2.840.10008.1.2.1"))]
        assert [status for _, status in send(images, "127.0.0.1", port, "PACS")] == [0, 0]
        assert len(list(folder.iterdir())) == 2
    finally:
        pacs.terminate()
        pacs.wait()


# Orthanc


@pytest.fixture
def orthanc(node, tmp_path):
    """Yield (HTTP address, DICOM port) of an Orthanc with our node as the modality `node`."""
    listener, _ = node
    http, dicom = free_port(), free_port()
    settings = {
        "StorageDirectory": str(tmp_path / "orthanc"),
        "IndexDirectory": str(tmp_path / "orthanc"),
        "HttpPort": http,
        "DicomPort": dicom,
        "DicomAet": "ORTHANC",
        "DicomModalities": {"node": ["CXRLOOP", "127.0.0.1", listener.port]},
        "AuthenticationEnabled": False,
        "RemoteAccessAllowed": False,
        "Plugins": [],
    }
    config = tmp_path / "orthanc.json"
    config.write_text(json.dumps(settings))
    program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
    server = subprocess.Popen([program, str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{http}"
    try:
        assert wait_for(lambda: ask(address + "/system"), 20)
        yield address, dicom
    finally:
        server.terminate()
        server.wait(20)


def ask(url, body=None):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as answer:
            return json.loads(answer.read())
    except (urllib.error.URLError, ConnectionError):
        return None


def test_orthanc_echoes_and_stores_to_us(node, orthanc, tmp_path):
    _, inbox = node
    address, _ = orthanc
    assert ask(address + "/modalities/node/echo", b"{}") == {}
    ids = [
        ask(address + "/instances", save(xray(n, transfer_syntax=syntax), tmp_path / f"{n}.dcm").read_bytes())["ID"]
        for n, syntax in enumerate(("1.2.840.10008.1.2.1", JPEG_LS, JPEG_2000_LOSSLESS))
    ]
    result = ask(address + "/modalities/node/store", json.dumps(ids).encode())
    assert result["FailedInstancesCount"] == 0
    assert [result.outcome for result in examined(inbox)] == ["admitted"] * 3


def test_orthanc_accepts_our_images(node, orthanc):
    address, port = orthanc
    images = [xray(n, transfer_syntax=syntax) for n, syntax in enumerate((JPEG_LS, "1.2.840.10008.1.2.1"))]
    assert [status for _, status in send(images, "127.0.0.1", port, "ORTHANC")] == [0, 0]
    assert len(ask(address + "/instances")) == 2


# dciodvfy


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("modality", ["DX", "CR", "OT"])
def test_a_wrapped_image_has_no_errors_by_dciodvfy(tmp_path, photometric, modality):
    facts = {"study_date": "20260102", "sex": "F", "age_years": 50, "modality": modality}
    path = save(xray(1, photometric=photometric, **facts), tmp_path / "image.dcm")
    result = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, timeout=60)
    errors = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("Error")]
    assert errors == []
