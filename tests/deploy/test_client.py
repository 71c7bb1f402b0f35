"""The client of the model server: what it does with answers that are none, and that no plate leaves the machine."""

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from deploy.client import Client, ServerDown, ServerRefused


@contextlib.contextmanager
def replying(reply: bytes) -> Iterator[str]:
    """A server that answers one request with these bytes and hangs up; its URL."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = server.accept()
        with connection:
            connection.settimeout(5)
            with contextlib.suppress(TimeoutError):
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65536)
            connection.sendall(reply)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                while connection.recv(1 << 20):
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        thread.join(10)
        server.close()


def answer(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (answer("503 Service Unavailable", b'{"error": "busy"}'), ServerDown, "busy"),
        (answer("409 Conflict", b'{"error": "not sealed", "bundle": "abc"}'), ServerRefused, "not sealed"),
        (answer("200 OK", b"<html>"), ServerRefused, "answered 200 without JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}", ServerDown, "no answer from"),
        (b"SSH-2.0-OpenSSH\r\n", ServerDown, "no answer from"),
        (b"", ServerDown, "no answer from"),
    ],
)
def test_each_kind_of_failure_has_its_exception(reply, error, message):
    with replying(reply) as url, Client(url) as client, pytest.raises(error, match=message):
        client.predict(np.zeros((1, 512, 512), np.uint8))


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH\r\n", answer("200 OK", b"<html>")])
def test_the_state_of_what_is_no_model_server_is_none(reply):
    with replying(reply) as url, Client(url) as client:
        assert client.state() is None
    assert Client(url).state() is None  # nothing listens there any more


def test_a_proxy_of_the_environment_is_never_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with replying(answer("200 OK", b'{"ready": true}')) as url, Client(url) as client:
        assert client.ready() == {"ready": True}


def test_asking_for_the_state_loads_no_http_library_and_no_numpy():
    code = "import sys; from deploy.client import Client; Client('http://127.0.0.1:9').state(); print({'httpx', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
