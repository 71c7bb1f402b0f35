"""Bad inputs 1 to 18 and 26 of 26, over plain sockets: interrupted transfers, SOP classes, objects.

Each gets its status and leaves nothing. The association continues where the standard allows it, and after every case
the node answers C-ECHO. Connections, titles and disks (19 to 24) are in test_hostile_connections.py.
"""

import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from agent.images import intake
from dicom.dataset.part10 import DEFLATED_LE, EXPLICIT_LE, IMPLICIT_LE
from dicom.dataset.syntaxes import JPEG_2000_LOSSLESS, JPEG_LS
from dicom.intake.examine import Admission, examine
from dicom.node import reception
from tests.conftest import make_site
from tests.support.dicom.hostile_inputs import BIG, CR, CT, DATA, DX, UID, VERIFICATION, file_names, running_listeners
from tests.support.dicom.pacs import KEY, data_set, wait_for, xray
from tests.support.dicom.raw_scu import A_ASSOCIATE_AC, Scu


@pytest.fixture
def node(tmp_path):
    with running_listeners(tmp_path) as start:
        yield start


# 1, 2: the sender disconnects during a transfer


@pytest.mark.parametrize("how", ["1 FIN", "2 A-ABORT", "1 RST"])
def test_a_sender_that_disconnects_during_an_image_leaves_nothing_and_is_counted(node, how):
    listener, inbox = node()
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        scu.start_store(DX, BIG.SOPInstanceUID)
        scu.send_data(data_set(BIG)[:600_000], last=False)
        assert wait_for(lambda: file_names(inbox))  # the transfer has begun
        if how == "2 A-ABORT":
            scu.abort()
            assert scu.closed_within(5)
        elif how == "1 RST":
            scu.wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert wait_for(lambda: listener.refusals.totals == {"unfinished": 1})
    assert file_names(inbox) == []


# 3: SOP classes that the node does not support


def test_3_an_unknown_sop_class_is_refused_in_its_context_only(node):
    listener, inbox = node()
    with Scu(listener.port) as scu:
        assert scu.associate([("1.3.46.670589.11.0.0.12.1", EXPLICIT_LE), (DX, EXPLICIT_LE)]) == A_ASSOCIATE_AC
        items = [at for at in range(68, len(scu.answer) - 8) if scu.answer[at : at + 2] == b"\x21\0"]
        results = {scu.answer[at + 4]: scu.answer[at + 6] for at in items}
        assert results == {1: 3, 3: 0}  # abstract syntax not supported, acceptance
        assert scu.store(DATA, DX, UID, context=3) == 0
    assert len(inbox.waiting()) == 1


# 4 to 16: objects

ENGINE = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
BOMB = b"".join(ENGINE.compress(b"\0" * (1 << 20)) for _ in range(300)) + ENGINE.flush()  # our limit is 256 MiB


def changed(**facts):
    ds = xray()
    for keyword, value in facts.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    ds.file_meta.MediaStorageSOPInstanceUID = UID
    return data_set(ds)


REFUSED = {
    "4 command of another class": (DATA, UID, CT, EXPLICIT_LE, reception.MISMATCH),
    "4 class of another context": (data_set(xray(1)), str(xray(1).SOPInstanceUID), DX, EXPLICIT_LE, 0x0122),
    "4 an image on Verification's": (DATA, UID, DX, IMPLICIT_LE, 0x0122),
    "5 command of another instance": (DATA, "1.2.3.4", DX, EXPLICIT_LE, reception.MISMATCH),
    "6 a path as UID": (DATA, "../../../../tmp/cxrloop-escaped", DX, EXPLICIT_LE, reception.INVALID_INSTANCE),
    "6 an absolute path as UID": (DATA, "/etc/passwd", DX, EXPLICIT_LE, reception.INVALID_INSTANCE),
    "7 letters and blanks as UID": (DATA, "1.2 3.abc", DX, EXPLICIT_LE, reception.INVALID_INSTANCE),
    "7 NUL in the UID": (DATA, "1.2\0.3", DX, EXPLICIT_LE, reception.INVALID_INSTANCE),
    "7 a UID of 70 characters": (DATA, "1." + "2" * 68, DX, EXPLICIT_LE, reception.INVALID_INSTANCE),
    "7 letters in the class": (DATA, UID, "not.a.class", EXPLICIT_LE, reception.MISMATCH),
    "8 no instance UID": (changed(SOPInstanceUID=None), UID, DX, EXPLICIT_LE, reception.NOT_UNDERSTOOD),
    "10 an empty data set": (b"", UID, DX, EXPLICIT_LE, reception.NOT_UNDERSTOOD),
    "11 random bytes": (bytes(range(1, 255)) * 4000, UID, DX, EXPLICIT_LE, reception.NOT_UNDERSTOOD),
    "12 implicit under explicit": (data_set(xray(transfer_syntax=IMPLICIT_LE)), UID, DX, EXPLICIT_LE, 0xC000),
    "12 explicit under implicit": (DATA, UID, DX, IMPLICIT_LE, 0xC000),
    "13 native pixels under JPEG 2000": (DATA, UID, DX, JPEG_2000_LOSSLESS, reception.NOT_UNDERSTOOD),
    "13 code stream under explicit": (data_set(xray(transfer_syntax=JPEG_LS)), UID, DX, EXPLICIT_LE, 0xC000),
    "14 pixels cut short": (DATA[:-500], UID, DX, EXPLICIT_LE, reception.NOT_UNDERSTOOD),
    "14 header cut short": (DATA[:200], UID, DX, EXPLICIT_LE, reception.NOT_UNDERSTOOD),
    "14 code stream cut short": (data_set(xray(transfer_syntax=JPEG_LS))[:-40], UID, DX, JPEG_LS, 0xC000),
    "16 deflate bomb": (BOMB, UID, DX, DEFLATED_LE, reception.NOT_UNDERSTOOD),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_object_that_is_refused_gets_its_status_keeps_the_association_and_leaves_nothing(node, name):
    listener, inbox = node()
    data, uid, sop_class, syntax, status = REFUSED[name]
    with Scu(listener.port) as scu:
        offered = CR if "another context" in name else VERIFICATION if "Verification" in name else DX
        scu.associate([(offered, syntax), (DX, EXPLICIT_LE)])
        assert scu.store(data, sop_class, uid) == status
        assert file_names(inbox) == []
        assert scu.store(DATA, DX, UID, context=3) == 0
        assert scu.release()
    assert listener.refusals.totals == {f"{status:04X}": 1}
    assert not Path("/tmp/cxrloop-escaped").exists()


ODD = {
    "9 no pixels": (changed(PixelData=None), "quarantined"),
    "15 65535 x 65535 with few pixels": (changed(Rows=65535, Columns=65535), "quarantined"),
    "26 a CT by its tags": (changed(Modality="CT"), "rejected"),
    "26 a lateral": (changed(ViewPosition="LL"), "rejected"),
    "26 a child": (changed(PatientAge="004Y"), "rejected"),
    "26 a knee": (changed(BodyPartExamined="KNEE"), "rejected"),
    "26 MONOCHROME1": (changed(PhotometricInterpretation="MONOCHROME1"), "admitted"),
    "26 a date in the future": (changed(StudyDate="20991231"), "admitted"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_node_does_not_refuse_by_content_and_the_intake_decides(node, name):
    listener, inbox = node()
    data, outcome = ODD[name]
    with Scu(listener.port) as scu:
        scu.associate([(DX, EXPLICIT_LE)])
        assert scu.store(data, DX, UID) == 0
    (path,) = inbox.waiting()
    assert path.read_bytes().endswith(data)
    assert examine(path, KEY, Admission()).outcome == outcome


SERVE = """
import sys, threading
from pathlib import Path
from dicom.store.inbox import Inbox
from dicom.node.listener import Listener, Node
listener = Listener(Node(port=0), Inbox(Path(sys.argv[1]), 0))
listener.start()
print(listener.port, flush=True)
threading.Event().wait()
"""


def peak(pid: int) -> int:
    """Return the peak memory of a process in bytes."""
    (line,) = [text for text in Path(f"/proc/{pid}/status").read_text().splitlines() if text.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def test_16_a_deflate_bomb_of_300_megabytes_needs_less_than_64_megabytes(tmp_path):
    serving = subprocess.Popen([sys.executable, "-c", SERVE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert serving.stdout
        with serving.stdout, Scu(int(serving.stdout.readline())) as scu:
            scu.associate([(DX, DEFLATED_LE), (DX, EXPLICIT_LE)])
            assert scu.store(DATA, DX, UID, context=3) == 0
            before = peak(serving.pid)
            assert scu.store(BOMB, DX, UID) == reception.NOT_UNDERSTOOD
            assert peak(serving.pid) - before < 64 << 20
    finally:
        serving.kill()
        serving.wait()


# 17, 18: the same UID again


def test_17_and_18_a_repeated_image_is_kept_once_and_a_different_one_with_its_uid_too(node, tmp_path):
    site = make_site(tmp_path / "site")
    listener, inbox = node(site.inbox)
    second_image = xray(99)
    second_image.SOPInstanceUID = second_image.file_meta.MediaStorageSOPInstanceUID = UID
    with Scu(listener.port) as scu, site.ledger() as ledger, intake.examiner(site) as pool:
        scu.associate([(DX, EXPLICIT_LE)])
        images = []
        for data in (DATA, DATA, data_set(second_image)):
            assert scu.store(data, DX, UID) == 0
            assert intake.step(site, ledger, pool) == 1
            images.append(ledger.value("SELECT count(*) FROM image WHERE sop_uid = ?", UID))
    assert images == [1, 1, 2]
    assert inbox.waiting() == []
