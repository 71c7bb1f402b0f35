"""Manifests and recipes: what is rejected, version 1, locks and whole folders."""

import json
import subprocess
import sys

import numpy as np
import pytest

from cxrloop.durable import whole_folder, write_json
from learner.data.plates import read_plate
from learner.errors import ManifestError, RecipeError, RoundBusy
from learner.round import manifest
from learner.round.folder import lock_round
from learner.round.manifest import load
from learner.round.recipe import RECIPES, Recipe, resolve
from tests.support.learner.round_folders import make_round, read_manifest, write_manifest


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_round(tmp_path_factory.mktemp("plain") / "r")


def spoiled(plain, folder, change):
    values = read_manifest(plain)
    values["plates"] = str(plain / "plates")
    change(values)
    write_manifest(folder, values)
    return folder


def test_a_manifest_is_loaded(plain):
    round_ = load(plain)
    assert (len(round_.labelled), len(round_.unlabelled)) == (6, 14)  # the pool includes the labelled images
    assert round_.samples[0].labels == (1, 0)
    assert round_.recipe.seed == 3


REFUSED = [
    (lambda m: m["images"][0].update(range="golden"), "golden image is never trained on"),
    (lambda m: m["images"][0].update(range="golden_next"), "golden image is never trained on"),
    (lambda m: m["images"][-1].update(patient="p0"), "patient p0 is in train and in calibration"),
    (lambda m: m.update(plate_version=2), "plate_version 2"),
    (lambda m: m.update(version=4), "version 4"),
    (lambda m: m.update(extra=1), "unknown extra"),
    (lambda m: m.pop("until"), "missing until"),
    (lambda m: m["images"][3].pop("labels"), "missing labels"),
    (lambda m: m["images"][2].update(labels=[1]), "needs 2 of 1, 0 or null"),
    (lambda m: m["images"][2].update(labels=[1, 0.5]), "needs 2 of 1, 0 or null"),
    (lambda m: m["images"][2].update(image=0), "appears twice"),
    (lambda m: m["images"][2].update(plate="../x.npy"), "leaves the plates folder"),
    (lambda m: m.update(findings=[]), "at least one name"),
    (lambda m: m.update(images=[]), "images is empty"),
    (lambda m: m.update(until="tonight"), "not an ISO 8601 time"),
    (lambda m: m.update(parent={"bundle": "abc", "state": "nowhere"}), "is missing"),
    (lambda m: m["recipe"].update(lamb=0.5), "did you mean 'lam'"),
    (lambda m: m["recipe"].update(flip="no"), "expected bool"),
    (lambda m: m["recipe"].update(clip=-1), "clip = -1.0: must not be below 0"),
    (lambda m: m["recipe"].update(weight_decay=float("nan")), "weight_decay = nan: expected float"),
    (lambda m: m["recipe"].update(prototypes=0), "needs at least 2"),
    (lambda m: m.update(seed=-1), "seed = -1: too small"),
    (lambda m: m["images"][0].update(patient=7) or m["images"][-1].update(patient="7"), "patient 7 is in train and in"),
]


@pytest.mark.parametrize(("change", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_a_wrong_manifest_is_rejected_with_its_reason(plain, tmp_path, change, why):
    with pytest.raises(ManifestError, match=why.replace(".", r"\.")):
        load(spoiled(plain, tmp_path, change))


def as_version_1(manifest):
    """The manifest as cxrloop 0.1.0 wrote it."""
    rest = {key: value for key, value in manifest.items() if key not in ("images", "notes")}
    return {**rest, "version": 1, "films": without_reasons(manifest)}


def test_view_and_scanner_of_an_image_are_optional_and_checked(plain, tmp_path):
    manifest = read_manifest(plain)
    first = manifest["images"][0]
    first |= {"view": "AP", "scanner": None}
    (tmp_path / "r").mkdir()
    write_manifest(tmp_path / "r", manifest)
    samples = load(tmp_path / "r").samples
    assert (samples[0].view, samples[0].scanner) == ("AP", None)
    assert (samples[1].view, samples[1].scanner) == (None, None)
    write_manifest(tmp_path / "r", manifest | {"images": [first | {"view": 3}]})
    with pytest.raises(ManifestError, match=r"images\[0\]: view = '3': expected a text or null"):
        load(tmp_path / "r")


def as_version_2(manifest):
    """The manifest as versions before the pool wrote it."""
    rest = {key: value for key, value in manifest.items() if key != "notes"}
    return {**rest, "version": 2, "images": without_reasons(manifest)}


def without_reasons(manifest):
    return [{key: value for key, value in entry.items() if key != "why"} for entry in manifest["images"]]


@pytest.mark.parametrize("earlier", [as_version_1, as_version_2])
def test_a_manifest_of_an_earlier_version_is_read_under_todays_keys(plain, tmp_path, earlier):
    current = read_manifest(spoiled(plain, tmp_path, lambda m: None))
    write_manifest(tmp_path, earlier(current))
    assert manifest.read_manifest(tmp_path) == current
    assert load(tmp_path).samples == load(plain).samples


def test_unchecked_manifest_raises_for_a_missing_file_and_for_a_file_that_is_no_object(tmp_path):
    with pytest.raises(FileNotFoundError):
        manifest.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ManifestError, match="expected an object"):
        manifest.read_manifest(tmp_path)


ODD = [None, 1, -1, 1.5, float("nan"), 10**400, True, "", "x", [], {}, [[]], [None], {"a": 1}]


def test_odd_values_of_any_key_load_or_raise_manifest_error(plain, tmp_path):
    """Any value gives a reason for people; after a crash the agent would restart the round again and again."""
    whole = spoiled(plain, tmp_path, lambda m: m.update(parent={"bundle": "abc", "state": "manifest.json"}))
    sound, refused = read_manifest(whole), set()
    load(whole)
    some = {"lr", "flip", "arch", "batch", "global_scale"}  # of the recipe; its other keys are of these kinds
    for part in (lambda m: m, lambda m: m["images"][2], lambda m: m["recipe"], lambda m: m["parent"]):
        keys = [key for key in part(sound) if len(part(sound)) < 20 or key in some]
        for key, value in [(key, value) for key in keys for value in ODD]:
            changed = json.loads(json.dumps(sound))
            part(changed)[key] = value
            write_manifest(whole, changed)
            try:
                load(whole)
            except ManifestError:
                refused.add(key)
    assert refused == sound.keys() | sound["images"][0].keys() | {"state", "bundle"} | some


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"[]", b"\xff\xfe"])
def test_files_that_are_no_manifest_are_rejected(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(ManifestError):
        load(tmp_path)


def test_files_that_are_no_plate_are_rejected(tmp_path):
    np.savez(tmp_path / "archive.npy.npz", np.zeros((512, 512), np.uint8))
    (tmp_path / "archive.npy.npz").rename(tmp_path / "archive.npy")
    np.save(tmp_path / "small.npy", np.zeros((256, 256), np.uint8))
    np.save(tmp_path / "float.npy", np.zeros((512, 512), np.float32))
    whole = (tmp_path / "small.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:999])
    (tmp_path / "empty.npy").touch()
    (tmp_path / "folder.npy").mkdir()
    for name in ("archive", "small", "float", "cut", "empty", "folder", "absent", "\ud800"):
        with pytest.raises(ManifestError):
            read_plate(tmp_path / f"{name}.npy")


@pytest.mark.parametrize(("first", "second"), [(0, -1), (0, 14), (14, -1)])
def test_a_patient_in_two_ranges_is_rejected_by_its_own_check(plain, tmp_path, monkeypatch, first, second):
    """For each pair of ranges; without this check the manifest would load."""

    def change(manifest):
        manifest["images"][second].update(patient=manifest["images"][first]["patient"])

    assert len({read_manifest(plain)["images"][i]["range"] for i in (first, second)}) == 2
    with pytest.raises(ManifestError, match="split by patient"):
        load(spoiled(plain, tmp_path, change))
    monkeypatch.setattr("learner.round.manifest._check_patient_range", lambda where, row, range_of: None)
    load(tmp_path)


def test_the_fingerprint_does_not_depend_on_the_window(plain, tmp_path):
    later = spoiled(plain, tmp_path, lambda m: m.update(until="2030-01-01T05:00:00+00:00", plates="plates"))
    assert load(later).fingerprint == load(plain).fingerprint
    other = spoiled(plain, tmp_path, lambda m: m.update(seed=4, plates="plates"))
    assert load(other).fingerprint != load(plain).fingerprint


def test_two_learners_cannot_lock_the_same_round(tmp_path):
    with lock_round(tmp_path), pytest.raises(RoundBusy), lock_round(tmp_path):
        pass
    with lock_round(tmp_path):
        pass


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "t0") as folder:
        write_json(folder / "card.json", {})
        raise KeyboardInterrupt
    assert not (tmp_path / "t0").exists()
    with whole_folder(tmp_path / "t0") as folder:
        assert list(folder.iterdir()) == []
        write_json(folder / "card.json", {"a": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["t0"]


def test_recipes_are_equal_after_json():
    for name in RECIPES:
        for profile in ("gpu", "cpu", "demo"):
            recipe = resolve(name, profile)
            assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_published_sizes_are_the_defaults():
    recipe = resolve("distl", "gpu")
    assert (recipe.image_size, recipe.local_size, recipe.local_views, recipe.prototypes) == (256, 128, 8, 65536)
    assert (recipe.lam, recipe.correct_every, recipe.epochs, recipe.ema_base, recipe.clip) == (0.5, 500, 5, 0.9995, 3.0)
    assert not recipe.flip


@pytest.mark.parametrize(
    "bad",
    [{"lam": 2}, {"batch": 0}, {"device": "tpu"}, {"global_scale": [0.9, 0.5]}, {"local_size": 999}, {"epochs": 1.5},
     {"flip": 1}, {"lr": 0}],
)  # fmt: skip
def test_wrong_values_are_rejected(bad):
    with pytest.raises(RecipeError, match=next(iter(bad))):
        resolve("distl", "demo", bad)


@pytest.mark.parametrize(
    ("name", "idle", "way_out"),
    [
        ("evolve", {"agree": "heads"}, 'targets = "graph"'),
        ("evolve", {"agree": "soft", "targets": "none", "refit": "linear"}, 'targets = "graph"'),
        ("evolve", {"thresholds": True}, 'targets = "graph"'),
        ("evolve", {"align": True, "targets": "graph", "refit": "graph"}, 'targets = "teacher"'),
        ("evolve", {"centring": "sinkhorn", "lam": 0.0}, "lam or ibot above 0"),
        ("evolve", {"blend": False}, "set blend = true"),
        ("evolve", {"targets": "teacher"}, 'set targets = "blend"'),
        ("evolve", {"serve": "teacher"}, "only distl"),
        ("evolve", {"targets": "none", "refit": "linear", "label_weight": 0.0, "lam": 0.0}, "nothing to learn"),
        ("evolve", {"pseudo_weight": 0.0, "label_weight": 0.0, "lam": 0.0}, "nothing to learn"),
        ("pretrain", {"targets": "teacher"}, "use evolve"),
        ("pretrain", {"replay": 0.25}, "use evolve"),
        ("pretrain", {"align": True}, 'targets = "teacher"'),
        ("pretrain", {"lam": 0.0, "ibot": 0.0, "koleo": 0.0}, "nothing to learn"),
    ],
)
def test_a_key_without_effect_is_rejected_with_a_solution(name, idle, way_out):
    with pytest.raises(RecipeError, match=way_out):
        resolve(name, "gpu", idle)


def test_errors_for_unknown_recipe_and_profile_list_the_known_ones():
    with pytest.raises(RecipeError, match="there is distl"):
        resolve("dist", "gpu")
    with pytest.raises(RecipeError, match="gpu, cpu, demo"):
        resolve("distl", "tpu")


def test_recipe_and_manifest_do_not_import_torch():
    code = "import sys, learner, learner.round.recipe, learner.round.manifest; print('torch' in sys.modules, 'timm' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
