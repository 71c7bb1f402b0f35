"""C-ECHO without a DICOM library: against our node, against another implementation, and against peers that misbehave."""

import contextlib
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from pynetdicom import AE, evt
from pynetdicom.pdu import A_ASSOCIATE_RQ

from dicom.client import echo
from dicom.dataset.part10 import EXPLICIT_LE
from dicom.node import tls
from dicom.node.listener import Listener, Node
from dicom.store.inbox import Inbox
from tests.support.dicom.certificates import authority
from tests.support.dicom.pacs import associate, wait_for
from tests.support.ports import free_port

VERIFICATION = echo.VERIFICATION.decode()


def asked(port: int, called: str = "CXRLOOP", patience: float = 10.0) -> bool:
    return echo.is_running("127.0.0.1", port, called, "CXRLOOP", patience=patience)


@contextlib.contextmanager
def listening(tmp_path, **keys) -> Iterator[Listener]:
    listener = Listener(Node(port=0, **keys), Inbox(tmp_path / "inbox", 0))
    listener.start()
    try:
        yield listener
    finally:
        listener.stop()


@contextlib.contextmanager
def verification_scp(status: int) -> Iterator[tuple[int, list[str]]]:
    """A verification SCP of pynetdicom that answers with `status`; its port, and the events it saw."""
    events: list[str] = []
    entity = AE("PEER")
    entity.add_supported_context(VERIFICATION)

    def on_echo(event):
        events.append("echo")
        return status

    handlers = [(evt.EVT_C_ECHO, on_echo), (evt.EVT_RELEASED, lambda event: events.append("released"))]
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    try:
        yield server.socket.getsockname()[1], events
    finally:
        server.shutdown()


@contextlib.contextmanager
def replying(*replies: bytes, hold: float = 0.0) -> Iterator[int]:
    """A port that answers each message with the next of `replies`, byte by byte, waits `hold` seconds and hangs up."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            with connection:
                for reply in replies:
                    connection.recv(4096)
                    for value in reply:
                        connection.sendall(bytes([value]))
                time.sleep(hold)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        thread.join(20)
        server.close()


def accept(result: int = 0) -> bytes:
    """An A-ASSOCIATE-AC whose one context has this result."""
    context = struct.pack(">BxBx", 1, result) + struct.pack(">BxH", 0x40, 17) + b"1.2.840.10008.1.2"
    body = struct.pack(">Hxx", 1) + b" " * 32 + bytes(32) + struct.pack(">BxH", 0x21, len(context)) + context
    return struct.pack(">BxL", 2, len(body)) + body


def response(status: int = 0, field: int = 0x8030, control: int = 3) -> bytes:
    elements = ((0x0100, field), (0x0120, 1), (0x0800, 0x0101), (0x0900, status))
    command = b"".join(struct.pack("<HHLH", 0, number, 2, value) for number, value in elements)
    value = struct.pack(">LBB", len(command) + 2, 1, control) + command
    return struct.pack(">BxL", 4, len(value)) + value


def reject(result: int) -> bytes:
    return struct.pack(">BxLxBBB", 3, 4, result, 3, 2)


def test_our_own_node_answers_and_under_another_name_it_does_not(tmp_path):
    with listening(tmp_path) as listener:
        assert asked(listener.port)
        assert not asked(listener.port, called="OTHER")
        port = listener.port
    assert not asked(port)


def test_a_node_at_its_limit_of_associations_is_ready(tmp_path):
    with listening(tmp_path, max_associations=1) as listener:
        held = associate(listener.port, [(VERIFICATION, EXPLICIT_LE)])
        assert wait_for(lambda: held.is_established)
        assert asked(listener.port)
        held.release()


def test_another_implementation_gets_one_echo_and_a_release():
    with verification_scp(0x0000) as (port, events):
        assert asked(port)
        assert wait_for(lambda: events == ["echo", "released"])
    with verification_scp(0x0122) as (port, _):
        assert not asked(port)


def test_another_implementation_reads_the_request():
    request = A_ASSOCIATE_RQ()
    request.decode(echo.association_request("CALLED", "A CALLING TITLE "))
    assert (request.called_ae_title, request.calling_ae_title.strip()) == ("CALLED", "A CALLING TITLE")
    (context,) = request.presentation_context
    assert (str(context.abstract_syntax), [str(uid) for uid in context.transfer_syntax]) == (
        VERIFICATION,
        ["1.2.840.10008.1.2"],
    )


def test_over_tls_only_the_pinned_certificate_is_taken(tmp_path):
    hospital = authority(tmp_path)
    ours, theirs = hospital.issue("ours"), hospital.issue("theirs")
    with listening(tmp_path, context=tls.server_context(ours)) as listener:

        def ask(context: ssl.SSLContext | None) -> bool:
            return echo.is_running("127.0.0.1", listener.port, "CXRLOOP", "CXRLOOP", tls=context, patience=5)

        assert ask(tls.own_node_context(ours))
        assert not ask(tls.own_node_context(theirs))
        assert not ask(None)


@pytest.mark.parametrize(
    ("replies", "ready"),
    [
        ((accept(), response()), True),
        ((accept(), response(control=1)), False),  # never a last fragment
        ((reject(2),), True),
        ((reject(1),), False),
        ((accept(3),), False),
        ((accept(), response(status=0x0211)), False),
        ((accept(), response(field=0x8001)), False),
        ((accept(), struct.pack(">BxL4x", 7, 4)), False),
        ((b"HTTP/1.1 400 Bad Request\r\n\r\n",), False),
        ((struct.pack(">BxL", 2, 1 << 31),), False),
        ((accept()[:40],), False),
        ((), False),
    ],
)
def test_only_a_success_or_a_busy_node_counts(replies, ready):
    with replying(*replies) as port:
        assert asked(port) is ready


def test_fragments_of_the_answer_are_put_together():
    whole = response()
    command = whole[12:]
    pieces = b"".join(
        struct.pack(">BxLLBB", 4, len(part) + 6, len(part) + 2, 1, control) + part
        for part, control in ((command[:7], 1), (command[7:], 3))
    )
    with replying(accept(), pieces) as port:
        assert asked(port)


def test_a_silent_peer_is_given_up_after_the_patience():
    with replying(b"", hold=3.0) as port:
        started = time.monotonic()
        assert not asked(port, patience=0.5)
        assert time.monotonic() - started < 2.5
    assert not asked(free_port())


def test_no_dicom_library_is_loaded():
    code = "import sys, dicom.client.echo; print({'pydicom', 'pynetdicom', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
