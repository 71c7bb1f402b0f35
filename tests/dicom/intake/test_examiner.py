"""The examining process: in order, streaming, and within its limits of time and memory."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from dicom.dataset.syntaxes import JPEG_2000_LOSSLESS, JPEG_LS
from dicom.intake.examine import Admission
from dicom.intake.examiner import Examiner
from dicom.phantom.wrap import wrap
from tests.support.dicom.pacs import KEY, save, wait_for, xray


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return small images, a slow one to decode, one that needs much memory (both valid), and a broken file."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 65535, (2200, 2200), dtype=np.uint16)  # slow for every codec
    wide = np.pad(rng.integers(0, 255, (128, 128), dtype=np.uint8), ((0, 9000 - 128), (0, 9000 - 128)))
    result = {f"small{n}": save(xray(n), folder / f"small{n}.dcm") for n in range(6)}
    result["slow"] = save(wrap(noise, "S", transfer_syntax=JPEG_2000_LOSSLESS), folder / "slow.dcm")
    result["wide"] = save(wrap(wide, "W", transfer_syntax=JPEG_LS), folder / "wide.dcm")
    result["broken"] = folder / "broken.dcm"
    result["broken"].write_bytes(b"no image")
    return result


def examiner(**limits):
    return Examiner(KEY, Admission(), **limits)


def workers():
    return [child.pid for child in multiprocessing.active_children() if child.name == "pebble_pool_worker"]


def test_results_are_in_order_and_the_source_is_read_as_needed(files):
    taken = []

    def paths():
        for n in range(6):
            taken.append(n)
            yield files[f"small{n}"]

    with examiner() as pool:
        results = pool.examine(paths())
        path, first = next(results)
        assert (path, first.outcome) == (files["small0"], "admitted")
        assert first.plate.shape == (512, 512)
        assert len(taken) <= 3
        assert [path for path, _ in results] == [files[f"small{n}"] for n in range(1, 6)]


def test_two_workers_keep_the_order(files):
    order = [files[name] for name in ("slow", "small0", "broken", "small1")]
    with examiner(workers=2) as pool:
        results = list(pool.examine(order))
    assert [path for path, _ in results] == order
    assert [result.outcome for _, result in results] == ["admitted", "admitted", "quarantined", "admitted"]


def test_an_image_that_takes_too_long_is_quarantined_and_the_next_is_examined(files):
    with examiner(timeout_s=0.3) as pool:
        list(pool.examine([files["small0"]]))
        began = time.monotonic()
        results = [result for _, result in pool.examine([files["slow"], files["small1"]])]
    assert results[0].outcome == "quarantined"
    assert results[0].reason == "limit: examining took longer than 0.3 s"
    assert len(results[0].sha256) == 64
    assert results[0].sop_uid and results[0].patient_key  # storage commitment and `forget` need these
    assert results[1].outcome == "admitted"
    assert time.monotonic() - began < 5


def test_an_image_that_needs_too_much_memory_is_quarantined_and_the_next_is_examined(files):
    with examiner(memory_bytes=300 << 20) as pool:
        results = [result for _, result in pool.examine([files["wide"], files["small1"]])]
    assert (results[0].outcome, results[0].reason) == (
        "quarantined",
        "limit: examining needs more than 300 MiB of memory",
    )
    assert results[1].outcome == "admitted"


def kill_soon(sent):
    def run():
        wait_for(workers)
        time.sleep(0.3)  # now it decodes the slow image
        for pid in workers():
            os.kill(pid, sent)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_worker_that_crashes_on_an_image_quarantines_it(files):
    with examiner() as pool:
        list(pool.examine([files["small0"]]))
        thread = kill_soon(signal.SIGSEGV)
        results = [result for _, result in pool.examine([files["slow"], files["small1"]])]
        thread.join()
    assert results[0].outcome == "quarantined"
    assert results[0].reason == "limit: the examining process died (exit code -11)"
    assert results[1].outcome == "admitted"


def test_an_image_whose_worker_was_killed_is_retried_once(files):
    with examiner() as pool:
        list(pool.examine([files["small0"]]))
        thread = kill_soon(signal.SIGKILL)
        results = [result for _, result in pool.examine([files["slow"], files["small1"]])]
        thread.join()
    assert [result.outcome for result in results] == ["admitted", "admitted"]


def test_a_worker_killed_while_idle_is_replaced(files):
    with examiner() as pool:
        list(pool.examine([files["small0"]]))
        (pid,) = workers()
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.3)
        results = [result for _, result in pool.examine([files["small1"], files["small2"]])]
    assert [result.outcome for result in results] == ["admitted", "admitted"]


def test_a_worker_killed_while_it_fetches_an_image_delays_others_only_for_seconds(files):
    with examiner() as pool:
        list(pool.examine([files["small0"]]))
        # state after a kill in those microseconds: the lock of the pipe is never released
        pool._pool._pool_manager.worker_manager.workers_channel.mutex.reader_mutex.acquire()
        started = time.monotonic()
        results = [result for _, result in pool.examine([files["small1"], files["small2"]])]
        seconds = time.monotonic() - started
    assert [result.outcome for result in results] == ["admitted", "admitted"]
    assert seconds < 40


def test_a_removed_file_is_skipped(files, tmp_path):
    with examiner() as pool:
        results = list(pool.examine([tmp_path / "gone.dcm", files["small0"]]))
    assert [path for path, _ in results] == [files["small0"]]


def test_an_unreadable_file_is_quarantined(files, tmp_path):
    folder = tmp_path / "folder.dcm"
    folder.mkdir()
    with examiner() as pool:
        (_, result), (_, after) = pool.examine([folder, files["small0"]])
    assert result.outcome == "quarantined"
    assert "IsADirectoryError" in result.reason
    assert after.outcome == "admitted"


def test_workers_end_with_the_examiner(files):
    with examiner(workers=2) as pool:
        list(pool.examine([files["small0"]]))
        assert len(workers()) == 2
    assert wait_for(lambda: not workers())


PARENT = """
import sys, time
from pathlib import Path
from dicom.intake.examine import Admission
from dicom.intake.examiner import Examiner
import multiprocessing
if __name__ == "__main__":
    pool = Examiner(b"k" * 32, Admission())
    list(pool.examine([Path(sys.argv[1])]))
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    for _ in pool.examine([Path(sys.argv[2])] * 20): pass
"""


def test_workers_die_with_a_parent_that_is_killed(files, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(files["small0"]), str(files["slow"])]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert pids
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()

    def gone(pid):
        try:
            with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
                return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    assert wait_for(lambda: all(gone(pid) for pid in pids), 5)
