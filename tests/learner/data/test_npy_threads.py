"""Many threads read .npy files at the same time; CPython's `ast`, which parses their headers in numpy, is not thread-safe.

Up to CPython 3.12 (gh-106905) about 15 of 4,000 plain `np.load` fail with a SystemError when garbage collections let other
threads run.
"""

import gc
import io
import threading
import time

import numpy as np
import pytest

from cxrloop import npy
from deploy.bundle.contract import read_probe
from deploy.server.request_body import read_plates
from learner.data.plates import read_plate

PLATE = np.zeros((512, 512), np.uint8)


@pytest.fixture
def collecting():
    """Collect garbage often, and let other threads run in each collection."""
    before = gc.get_threshold()

    def let_others(phase: str, info: dict) -> None:
        time.sleep(0)

    gc.callbacks.append(let_others)
    gc.set_threshold(7)
    yield
    gc.callbacks.remove(let_others)
    gc.set_threshold(*before)


def saved(array: np.ndarray) -> bytes:
    body = io.BytesIO()
    np.save(body, array)
    return body.getvalue()


@pytest.mark.parametrize("reader", ["the learner's plate", "the store's plate", "a heatmap", "a request", "a probe"])
def test_many_threads_read_arrays_at_the_same_time(tmp_path, collecting, reader):
    path, small, body = tmp_path / "plate.npy", saved(np.zeros((1, 8, 8), np.uint8)), saved(PLATE[None])
    np.save(path, PLATE)
    np.savez(tmp_path / "probe.npz", plates=PLATE[None], logits=np.zeros((1, 1), np.float32))
    read = {
        "the learner's plate": lambda: read_plate(path),
        "the store's plate": lambda: npy.load(path),
        "a heatmap": lambda: npy.loads(small),
        "a request": lambda: read_plates(body),
        "a probe": lambda: read_probe(tmp_path / "probe.npz", 1),
    }[reader]
    failed: list[BaseException] = []

    def again() -> None:
        try:
            for _ in range(1000 if reader != "a probe" else 250):
                read()
        except SystemError as error:
            failed.append(error)

    threads = [threading.Thread(target=again) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
