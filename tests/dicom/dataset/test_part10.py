"""Envelope and header: strict, with limits; no bytes make the examination raise an exception."""

import io
import random
import tracemalloc
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread

from dicom.dataset.part10 import (
    DEFLATED_LE,
    EXPLICIT_LE,
    IMPLICIT_LE,
    content_sha256,
    file_meta,
    inflate,
    is_uid,
    open_envelope,
    read_header,
    shown,
)
from dicom.dataset.syntaxes import JPEG_2000_LOSSLESS, JPEG_LS
from dicom.errors import Unreadable
from dicom.intake.examine import Admission, examine
from tests.support.dicom.pacs import KEY, data_set, save, xray

pytestmark = pytest.mark.filterwarnings("ignore:.*(encoding|Character Set).*:UserWarning")  # of hostile headers


def file_bytes(ds):
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_our_file_meta_is_read_by_pydicom_and_by_us():
    ds = xray()
    data = file_meta(ds.SOPClassUID, ds.SOPInstanceUID, EXPLICIT_LE) + data_set(ds)
    envelope = open_envelope(io.BytesIO(data))
    assert envelope.transfer_syntax == EXPLICIT_LE
    read = dcmread(io.BytesIO(data))
    assert read.SOPInstanceUID == read.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
    assert read.file_meta.TransferSyntaxUID == EXPLICIT_LE


@pytest.mark.parametrize("text", ["1.2.3", "1.2.03", "1." + "2" * 62])
def test_uids(text):
    assert is_uid(text)


@pytest.mark.parametrize(
    "text", ["", None, "1", "1..2", "1.2.", "../x", "1.2 ", "1.2\0", "1." + "2" * 63, "1.2.a", "1.\n2", "1.2\n"]
)
def test_strings_that_are_not_uids(text):
    assert not is_uid(text)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty file"),
        (b"\0" * 128, "no DICM prefix"),
        (b"<html>" * 100, "no DICM prefix"),
        (b"\0" * 128 + b"DICM", "TransferSyntaxUID"),
        (b"\0" * 128 + b"DICM" + b"\x02\0\x10\0UI\xff\xff1.2", "file ends within the file meta"),
        (b"\0" * 128 + b"DICM" + b"\x02\0\x02\0OB\0\0\xff\xff\xff\xff", "file meta element"),
    ],
)
def test_an_invalid_envelope_is_reported_with_its_reason(data, why):
    with pytest.raises(Unreadable, match=why):
        open_envelope(io.BytesIO(data))


def test_the_hash_of_an_unreadable_file_covers_all_its_bytes(tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    first.write_bytes(b"some bytes")
    second.write_bytes(b"other bytes")
    assert content_sha256(first) != content_sha256(second)


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, IMPLICIT_LE, JPEG_LS, JPEG_2000_LOSSLESS, DEFLATED_LE])
def test_a_data_set_cut_anywhere_is_refused(syntax):
    data = data_set(xray(transfer_syntax=syntax))
    assert read_header(io.BytesIO(data), syntax).pixel_length
    places = {0, 1, 7, 9, 100, len(data) // 2, len(data) - 2}
    for length in sorted(places):
        with pytest.raises(Unreadable):
            header = read_header(io.BytesIO(data[:length]), syntax)
            raise Unreadable("no pixels") if header.pixel_length is None else AssertionError(length)


def test_implicit_bytes_under_an_explicit_syntax_are_refused_and_the_other_way_round():
    with pytest.raises(Unreadable, match="as its transfer syntax says"):
        read_header(io.BytesIO(data_set(xray(transfer_syntax=IMPLICIT_LE))), EXPLICIT_LE)
    with pytest.raises(Unreadable, match="as its transfer syntax says"):
        read_header(io.BytesIO(data_set(xray())), IMPLICIT_LE)


def test_a_deflate_bomb_stops_at_its_limit_and_needs_little_memory():
    engine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(engine.compress(b"\0" * (1 << 20)) for _ in range(80)) + engine.flush()
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    with pytest.raises(Unreadable, match="grows beyond 64 MiB"):
        inflate(io.BytesIO(bomb), limit=64 << 20, keep=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20


def test_inflate_keeps_the_head_and_counts_the_rest():
    engine = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    deflated = engine.compress(b"head" + b"x" * 5_000_000) + engine.flush()
    head, total = inflate(io.BytesIO(deflated), keep=100)
    assert head.startswith(b"head")
    assert total == 5_000_004


def test_shown_values_are_short_and_printable():
    assert shown("a\nb\x1b[31m") == "a?b?[31m"
    assert shown("") == "empty"
    assert len(shown("x" * 1000)) == 43


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400))
def test_any_bytes_behind_a_valid_file_meta_are_examined_without_an_exception(tmp_path, data):
    path = tmp_path / "image.dcm"
    path.write_bytes(file_meta("1.2.840.10008.5.1.4.1.1.1", "1.2.3", EXPLICIT_LE) + data)
    assert examine(path, KEY, Admission()).outcome != "admitted"


@pytest.mark.parametrize("syntax", [EXPLICIT_LE, IMPLICIT_LE, DEFLATED_LE, JPEG_LS, JPEG_2000_LOSSLESS])
def test_an_image_with_changed_bytes_always_gets_an_outcome(tmp_path, syntax):
    rng, good, path = (
        random.Random(syntax),
        file_bytes(xray(transfer_syntax=syntax)),
        save(xray(), tmp_path / "image.dcm"),
    )
    outcomes = set()
    for _ in range(120):
        data = bytearray(good)
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(132, min(len(data), 1400))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        result = examine(path, KEY, Admission())
        outcomes.add(result.outcome)
        assert (result.reason is None) == (result.outcome == "admitted")
    assert "quarantined" in outcomes
