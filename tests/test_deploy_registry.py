"""The signed pointer: atomic, verified at every read, refused when touched."""

import json

import pytest

from deploy import registry
from tests.deploy_site import AT, Site

A, B = "0123456789ab", "ba9876543210"


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path / "a")


def test_there_is_no_pointer_before_the_first_model(site):
    assert registry.read(site.site) is None
    assert registry.mark(site.site) is None


def test_the_pointer_reads_back_as_written_and_its_mark_moves(site):
    assert registry.write(site.site, A, None, "Dr Osei", AT, site.key) == registry.Pointer(A, None, "Dr Osei", AT)
    before = registry.mark(site.site)
    registry.write(site.site, B, A, "Dr Osei", AT, site.key)
    assert registry.read(site.site) == registry.Pointer(B, A, "Dr Osei", AT)
    assert registry.mark(site.site) != before
    assert sorted(p.name for p in site.site.iterdir()) == ["current", "keys"]


@pytest.mark.parametrize("field", ["bundle", "previous", "by", "at"])
def test_a_pointer_changed_by_hand_is_refused(site, field):
    registry.write(site.site, A, B, "Dr Osei", AT, site.key)
    document = json.loads((site.site / "current").read_text())
    (site.site / "current").write_text(json.dumps(document | {field: A if document[field] == B else B}))
    with pytest.raises(
        registry.PointerRefused, match=r"current: changed by hand or signed by another key; set it again"
    ):
        registry.read(site.site)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bundle": 1}', '{"signature": 3, "bundle": "x"}', "\x00"])
def test_a_pointer_that_is_none_is_refused(site, text):
    (site.site / "current").write_text(text)
    with pytest.raises(registry.PointerRefused, match="unreadable"):
        registry.read(site.site)


def test_a_bundles_signature_does_not_pass_as_a_pointers(site):
    from deploy.durable import sign

    document = {"bundle": A, "previous": None, "by": "x", "at": AT}
    forged = sign("cxrloop bundle v1", document, site.key)
    (site.site / "current").write_text(json.dumps({**document, "signature": forged}))
    with pytest.raises(registry.PointerRefused, match="changed by hand"):
        registry.read(site.site)


def test_an_id_that_is_none_is_never_pointed_at(site):
    with pytest.raises(ValueError, match="not an id"):
        registry.write(site.site, "../../etc", None, "x", AT, site.key)
    assert registry.read(site.site) is None
