"""Bundles and keys: only an unchanged, signed bundle opens."""

import json
import shutil
import stat

import numpy as np
import pytest
from onnx import TensorProto

from deploy.bundle.bundle import open_bundle, seal, sweep
from deploy.bundle.keys import new_keys, read_private, read_public
from deploy.bundle.onnx_import import import_onnx
from deploy.errors import BundleRefused, KeyRefused
from tests.support.deploy.model_server import FINDINGS, Site, make_parts, write_model


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A site with one bundle; tests that damage it work on a copy."""
    site = Site(tmp_path_factory.mktemp("sealed") / "a")
    return site, site.add(1)


@pytest.fixture
def site(sealed, tmp_path):
    shutil.copytree(sealed[0].folder, tmp_path / "a", dirs_exist_ok=True)
    copy = object.__new__(Site)
    copy.folder, copy.site, copy.models = tmp_path / "a", tmp_path / "a/site", tmp_path / "a/site/models"
    copy.key = sealed[0].key
    return copy


def public(site):
    return read_public(site.site / "keys")


def test_a_sealed_bundle_opens_with_its_findings_and_thresholds(sealed):
    site, bundle = sealed
    opened = open_bundle(site.models, bundle, public(site))
    assert (opened.id, opened.findings, opened.plate_version) == (bundle, FINDINGS, 1)
    assert opened.thresholds["nodule"] == {
        "threshold": 0.5,
        "rule": "imported: no calibration",
        "sensitivity": None,
        "specificity": None,
        "n": 0,
    }
    assert sorted(p.name for p in opened.folder.iterdir()) == [
        "card.json",
        "model.onnx",
        "probe.npz",
        "seal.json",
        "thresholds.json",
    ]


def test_sealing_twice_gives_one_bundle_and_no_leftovers(site):
    first, second = site.add(2), seal(site.folder / "parts2", site.models, site.key)
    assert first == second
    assert not [p for p in site.models.iterdir() if p.name.startswith(".")]


def test_the_same_onnx_imported_twice_is_the_same_bundle(site):
    assert seal(make_parts(site.folder / "again", 1), site.models, site.key) in {p.name for p in site.models.iterdir()}
    assert len(list(site.models.iterdir())) == 1


@pytest.mark.parametrize("name", ["model.onnx", "card.json", "thresholds.json", "probe.npz"])
def test_a_changed_file_is_refused_by_name(site, sealed, name):
    path = site.models / sealed[1] / name
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleRefused, match=rf"{sealed[1]}: {name} was changed after sealing; restore"):
        open_bundle(site.models, sealed[1], public(site))
    with pytest.raises(BundleRefused, match=rf"{name} was changed"):
        seal(site.folder / "parts1", site.models, site.key)


def test_a_missing_and_an_added_file_are_refused(site, sealed):
    (site.models / sealed[1] / "model.onnx.data").write_bytes(b"weights from elsewhere")
    with pytest.raises(BundleRefused, match=r"model.onnx.data was added after sealing"):
        open_bundle(site.models, sealed[1], public(site))
    (site.models / sealed[1] / "model.onnx.data").unlink()
    (site.models / sealed[1] / "card.json").unlink()
    with pytest.raises(BundleRefused, match=r"card.json is missing"):
        open_bundle(site.models, sealed[1], public(site))


def test_an_unsigned_bundle_is_refused(site, sealed):
    (site.models / sealed[1] / "seal.json").unlink()
    with pytest.raises(BundleRefused, match="unsigned"):
        open_bundle(site.models, sealed[1], public(site))


def test_a_bundle_of_another_site_is_refused(sealed, tmp_path):
    site, bundle = sealed
    new_keys(tmp_path)
    with pytest.raises(BundleRefused, match=r"not signed by this site's key"):
        open_bundle(site.models, bundle, read_public(tmp_path))


def test_a_bundle_renamed_to_another_id_is_refused(site, sealed):
    (site.models / sealed[1]).rename(site.models / "0123456789ab")
    with pytest.raises(BundleRefused, match=f"belongs to another bundle \\({sealed[1]}\\)"):
        open_bundle(site.models, "0123456789ab", public(site))


@pytest.mark.parametrize("name", ["../keys", "", "0123456789AB", "0123456789abc"])
def test_a_malformed_id_is_refused_before_the_disk_is_read(sealed, name):
    with pytest.raises(BundleRefused, match="not an id"):
        open_bundle(sealed[0].models, name, public(sealed[0]))


def test_parts_of_another_plate_version_are_neither_sealed_nor_opened(site):
    parts = make_parts(site.folder / "old", 3)
    card = json.loads((parts / "card.json").read_text()) | {"plate_version": 2}
    (parts / "card.json").write_text(json.dumps(card))
    with pytest.raises(BundleRefused, match=r"plate_version 2, expected 1; train a round"):
        seal(parts, site.models, site.key)


def test_malformed_parts_are_refused_by_name(site):
    for name, content, message in [
        ("thresholds.json", json.dumps({"effusion": {"threshold": 0.5}}), "pneumonia needs a threshold"),
        ("card.json", "{", "card.json: not JSON"),
        ("card.json", json.dumps({"findings": []}), "non-empty list"),
        ("probe.npz", "nothing", "probe.npz: unreadable"),
    ]:
        parts = site.folder / "damaged"
        shutil.copytree(site.folder / "parts1", parts)
        (parts / name).write_text(content)
        with pytest.raises(BundleRefused, match=message):
            seal(parts, site.models, site.key)
        shutil.rmtree(parts)


def test_leftovers_of_a_crashed_sealing_are_swept(site, sealed):
    (site.models / ".0a1b.tmp").mkdir()
    (site.models / ".0a1b.tmp" / "model.onnx").write_bytes(b"half")
    sweep(site.models)
    assert [p.name for p in site.models.iterdir()] == [sealed[1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": TensorProto.FLOAT}, r"input plates is tensor\(float\).*expected tensor\(uint8\) \[N, 512, 512\]"),
        ({"plates": [1, 512, 512]}, r"input plates is tensor\(uint8\) \[1, 512, 512\], expected"),
        ({"drop": ["heatmap"]}, r"has outputs \['embedding', 'logits'\], expected logits, embedding, heatmap"),
    ],
)
def test_an_onnx_that_breaks_the_contract_is_refused_with_got_and_expected(tmp_path, changes, message):
    file = write_model(tmp_path / "m.onnx", **changes)
    with pytest.raises(BundleRefused, match=message):
        import_onnx(file, tmp_path / "parts", FINDINGS)
    assert not (tmp_path / "parts").exists()


def test_an_onnx_for_other_findings_or_without_a_graph_is_refused(tmp_path):
    file = write_model(tmp_path / "m.onnx")
    with pytest.raises(BundleRefused, match=r"logits is tensor\(float\) \['N', 3\], expected tensor\(float\) \[N, 2\]"):
        import_onnx(file, tmp_path / "parts", FINDINGS[:2])
    file.write_bytes(b"not a graph")
    with pytest.raises(BundleRefused, match=r"m.onnx"):
        import_onnx(file, tmp_path / "parts", FINDINGS)


def test_the_probe_of_an_imported_model_has_eight_synthetic_plates(sealed):
    site, bundle = sealed
    with np.load(site.models / bundle / "probe.npz") as probe:
        assert probe["plates"].shape == (8, 512, 512) and probe["plates"].dtype == np.uint8
        assert probe["logits"].shape == (8, len(FINDINGS))


def test_keys_are_made_once_and_the_private_key_is_not_readable_by_others(tmp_path):
    new_keys(tmp_path / "keys")
    assert stat.S_IMODE((tmp_path / "keys/signing.key").stat().st_mode) == 0o600
    assert len(read_private(tmp_path / "keys")) == len(read_public(tmp_path / "keys")) == 32
    with pytest.raises(KeyRefused, match=r"signing.key exists; a new key would make every bundle invalid"):
        new_keys(tmp_path / "keys")
    (tmp_path / "keys/signing.pub").write_bytes(b"short")
    with pytest.raises(KeyRefused, match="5 bytes, expected 32; restore"):
        read_public(tmp_path / "keys")
    with pytest.raises(KeyRefused, match="missing; restore"):
        read_private(tmp_path / "nowhere")
