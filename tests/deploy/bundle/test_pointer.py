"""The signed pointer: atomic, verified at every read, refused after any change."""

import json

import pytest

from deploy.bundle import pointer
from deploy.bundle.signing import sign
from deploy.errors import PointerRefused
from tests.support.deploy.model_server import AT, Site

A, B = "0123456789ab", "ba9876543210"


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path / "a")


def test_there_is_no_pointer_before_the_first_model(site):
    assert pointer.read(site.site) is None
    assert pointer.mark(site.site) is None


def test_the_pointer_reads_back_as_written_and_its_mark_moves(site):
    assert pointer.write(site.site, A, None, "Dr Osei", AT, site.key) == pointer.Pointer(A, None, "Dr Osei", AT)
    before = pointer.mark(site.site)
    pointer.write(site.site, B, A, "Dr Osei", AT, site.key)
    assert pointer.read(site.site) == pointer.Pointer(B, A, "Dr Osei", AT)
    assert pointer.mark(site.site) != before
    assert sorted(p.name for p in site.site.iterdir()) == ["current", "keys"]


@pytest.mark.parametrize("field", ["bundle", "previous", "by", "at"])
def test_a_pointer_changed_by_hand_is_refused(site, field):
    pointer.write(site.site, A, B, "Dr Osei", AT, site.key)
    document = json.loads((site.site / "current").read_text())
    (site.site / "current").write_text(json.dumps(document | {field: A if document[field] == B else B}))
    with pytest.raises(PointerRefused, match=r"current: changed by hand or signed by another key; set it again"):
        pointer.read(site.site)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bundle": 1}', '{"signature": 3, "bundle": "x"}', "\x00"])
def test_a_file_that_is_no_pointer_is_refused(site, text):
    (site.site / "current").write_text(text)
    with pytest.raises(PointerRefused, match="unreadable"):
        pointer.read(site.site)


def test_the_signature_of_a_bundle_does_not_pass_for_a_pointer(site):
    document = {"bundle": A, "previous": None, "by": "x", "at": AT}
    forged = sign("cxrloop bundle v1", document, site.key)
    (site.site / "current").write_text(json.dumps({**document, "signature": forged}))
    with pytest.raises(PointerRefused, match="changed by hand"):
        pointer.read(site.site)


def test_a_malformed_id_is_never_written(site):
    with pytest.raises(ValueError, match="not an id"):
        pointer.write(site.site, "../../etc", None, "x", AT, site.key)
    assert pointer.read(site.site) is None
