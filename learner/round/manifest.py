"""The manifest of a round: which images, labels, recipe and parent a round trains with, and the checks of all of it.

`load` rejects golden images, a patient in two ranges and plates of another version. Must not import torch: the agent
reads manifests with this module.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from cxrloop.durable import write_json
from cxrloop.plate import PLATE_VERSION
from learner.errors import ManifestError, RecipeError
from learner.round.recipe import Recipe

RANGES = ("train", "validation", "calibration")
VERSION = 3  # of the manifest
KEYS = {  # of the manifest, and the types that each value may have
    "version": (int,), "round": (str,), "plate_version": (int,), "findings": (list,), "recipe": (dict,), "seed": (int,),
    "plates": (str,), "parent": (dict, NoneType), "until": (str, NoneType), "images": (list,),
    "notes": (list,),
}  # fmt: skip
SAMPLE_KEYS = {
    "image": (int,), "patient": (str, int), "plate": (str,), "range": (str,), "labels": (list, NoneType),
    "why": (str, NoneType),
}  # fmt: skip
# Keys that a manifest of this version may lack: they were added after its first rounds.
OPTIONAL_SAMPLE_KEYS: dict[str, tuple[type, ...]] = {"view": (str, NoneType), "scanner": (str, NoneType)}
PARENT_KEYS = {"bundle": (str,), "state": (str,)}
TYPE_NAMES = {int: "a whole number", str: "a text", list: "a list", dict: "an object", NoneType: "null"}


@dataclass(frozen=True)
class Sample:
    """One image of the round, its plate file and its labels; labels[f] is 1, 0 or None (unknown)."""

    image: int
    patient: str
    plate: Path
    range: str
    labels: tuple[int | None, ...]
    view: str | None = None  # of the header, as the scanner; None = not known
    scanner: str | None = None

    @property
    def labelled(self) -> bool:
        """Whether the label of at least one finding is known."""
        return any(label is not None for label in self.labels)


@dataclass(frozen=True)
class RoundManifest:
    """A checked manifest."""

    folder: Path
    name: str
    findings: tuple[str, ...]
    recipe: Recipe
    parent: str | None
    parent_state: Path | None
    until: datetime | None
    samples: tuple[Sample, ...]
    fingerprint: str  # sha256 of everything that changes the result, that is of all keys but `until`
    notes: tuple[str, ...] = ()  # of the agent, for result and card

    def of(self, range_: str) -> tuple[Sample, ...]:
        """Return the samples of a range."""
        return tuple(sample for sample in self.samples if sample.range == range_)

    @property
    def unlabelled(self) -> tuple[Sample, ...]:
        """The unlabelled pool: all train images; those with labels are in it too, used without their labels."""
        return self.of("train")

    @property
    def labelled(self) -> tuple[Sample, ...]:
        """The train images with a known label of at least one finding."""
        return tuple(sample for sample in self.of("train") if sample.labelled)


def write_manifest(
    folder: Path, *, findings: Sequence[str], recipe: Recipe, seed: int, plates: str,
    parent: tuple[str, str] | None, images: list[dict[str, Any]], notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write the manifest of a new round into its folder, which has the round's name.

    `images`: one dict each with the keys of SAMPLE_KEYS; `why`, the reason why an image is in the round, may be left out.
    `plates`: the folder of the plates, and the second of `parent` (bundle, its training state), relative to `folder`.
    """
    document = {
        "version": VERSION, "round": folder.name, "plate_version": PLATE_VERSION, "findings": list(findings),
        "recipe": recipe.to_dict(), "seed": seed, "plates": plates,
        "parent": {"bundle": parent[0], "state": parent[1]} if parent else None, "until": None,
        "notes": list(notes), "images": [{"why": None} | image for image in images],
    }  # fmt: skip
    write_json(folder / "manifest.json", document)


def set_until(folder: Path, until: str | None) -> None:
    """Change when the round must pause (ISO 8601 text, or None); the keys stay as written, and so the fingerprint."""
    written = _read(folder / "manifest.json")
    if written["until"] != until:
        write_json(folder / "manifest.json", written | {"until": until})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return `folder/manifest.json` with the keys of the current version; its values are not checked.

    Raises FileNotFoundError, and ManifestError for a file that is not a JSON object.
    """
    return _current_keys(_read(folder / "manifest.json"))


def load(folder: Path) -> RoundManifest:
    """Return the checked manifest of a round folder. Raises ManifestError."""
    path = folder / "manifest.json"
    try:
        written = _read(path)
    except FileNotFoundError:
        raise ManifestError(f"{path}: no manifest; the agent writes it before the learner starts") from None
    # hash the keys as written, so that a round started by 0.1.0 keeps its fingerprint
    decisive = json.dumps({k: v for k, v in written.items() if k != "until"}, sort_keys=True)
    raw = _current_keys(written)
    _check_keys("manifest", raw, KEYS)
    if raw["version"] != VERSION:
        raise ManifestError(f"manifest: version {raw['version']!r}; this learner reads versions 1 to {VERSION}")
    if raw["plate_version"] != PLATE_VERSION:
        raise ManifestError(
            f"manifest: plate_version {raw['plate_version']!r}, this learner was made for {PLATE_VERSION}: "
            "make the plates again from the originals"
        )
    findings = tuple(raw["findings"])
    if not findings or not all(isinstance(f, str) and f for f in findings) or len(set(findings)) != len(findings):
        raise ManifestError(f"manifest: findings {raw['findings']!r}: needs at least one name, each once")
    if not all(isinstance(note, str) for note in raw["notes"]):
        raise ManifestError(f"manifest: notes {raw['notes']!r}: expected texts")
    try:
        recipe = Recipe.from_dict(raw["recipe"]).override({"seed": raw["seed"]})
    except RecipeError as error:
        raise ManifestError(f"manifest: {error}") from None
    samples = _samples(raw["images"], folder / raw["plates"], len(findings))
    parent, state = _parent(raw["parent"], folder)
    return RoundManifest(
        folder=folder, name=raw["round"], findings=findings, recipe=recipe, parent=parent, parent_state=state,
        until=_until(raw["until"]), samples=samples, notes=tuple(raw["notes"]), fingerprint=hashlib.sha256(decisive.encode()).hexdigest(),
    )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        written = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ManifestError(f"{path}: not JSON ({error})") from None
    if not isinstance(written, dict):
        raise ManifestError(f"{path}: expected an object with {', '.join(sorted(KEYS))}")
    return written


def _current_keys(written: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest with the keys of this version.

    Version 1, of cxrloop 0.1.0, had another name for `images`; versions 1 and 2 had no notes and no `why` of an image.
    """
    version = written.get("version")
    name = "films" if version == 1 else "images"
    if version not in (1, 2) or not isinstance(images := written.get(name), list):
        return written
    rest = {key: value for key, value in written.items() if key != name}
    with_why = [{"why": None} | image if isinstance(image, dict) else image for image in images]
    return {**rest, "version": VERSION, "notes": [], "images": with_why}


def _samples(rows: Any, plates: Path, width: int) -> tuple[Sample, ...]:
    if not rows:
        raise ManifestError("manifest: images is empty; a round needs train images")
    samples, range_of, seen = [], {}, set()
    for number, row in enumerate(rows):
        where = f"manifest: images[{number}]"
        _check_keys(where, row, SAMPLE_KEYS, OPTIONAL_SAMPLE_KEYS)
        if row["range"].startswith("golden"):
            raise ManifestError(f"{where}: image {row['image']} is {row['range']}: a golden image is never trained on")
        if row["range"] not in RANGES:
            raise ManifestError(f"{where}: range {row['range']!r}; must be one of {', '.join(RANGES)}")
        _check_patient_range(where, row, range_of)
        if row["image"] in seen:
            raise ManifestError(f"{where}: image {row['image']} appears twice")
        seen.add(row["image"])
        labels = row["labels"] if row["labels"] is not None else [None] * width
        if len(labels) != width or any(v is not None and v not in (0, 1) for v in labels):
            raise ManifestError(f"{where}: labels {labels!r}; needs {width} of 1, 0 or null")
        relative = PurePosixPath(row["plate"])
        if relative.is_absolute() or ".." in relative.parts:
            raise ManifestError(f"{where}: plate {row['plate']!r} leaves the plates folder")
        labels = tuple(None if v is None else int(v) for v in labels)
        extra: dict[str, Any] = {key: row.get(key) for key in OPTIONAL_SAMPLE_KEYS}
        samples.append(Sample(row["image"], str(row["patient"]), plates / relative, row["range"], labels, **extra))
    if not any(sample.range == "train" for sample in samples):
        raise ManifestError("manifest: no image in range train")
    return tuple(samples)


def _check_patient_range(where: str, row: dict[str, Any], range_of: dict[str, str]) -> None:
    """Raise ManifestError where a patient's images are in two ranges: training would see patients of the other range."""
    first = range_of.setdefault(str(row["patient"]), row["range"])
    if first != row["range"]:
        raise ManifestError(f"{where}: patient {row['patient']} is in {first} and in {row['range']}; split by patient")


def _parent(raw: Any, folder: Path) -> tuple[str | None, Path | None]:
    if raw is None:
        return None, None
    _check_keys("manifest: parent", raw, PARENT_KEYS)
    state = folder / raw["state"]
    if not state.is_file():
        raise ManifestError(f"manifest: parent {raw['bundle']}: {state} is missing; restore it, or plan a new round")
    return raw["bundle"], state


def _until(raw: Any) -> datetime | None:
    if raw is None:
        return None
    try:
        until = datetime.fromisoformat(raw)
    except ValueError:
        raise ManifestError(f"manifest: until {raw!r}: not an ISO 8601 time in UTC") from None
    return until if until.tzinfo else until.replace(tzinfo=UTC)


def _check_keys(
    where: str, raw: Any, types: dict[str, tuple[type, ...]], optional: dict[str, tuple[type, ...]] | None = None
) -> None:
    """Raise ManifestError unless `raw` has exactly these keys, and any of the optional ones, with values of these types.

    bool does not count as int.
    """
    if not isinstance(raw, dict):
        raise ManifestError(f"{where}: expected an object with {', '.join(sorted(types))}")
    known = types | (optional or {})
    for problem, keys in (("missing", set(types) - set(raw)), ("unknown", set(raw) - set(known))):
        if keys:
            raise ManifestError(f"{where}: {problem} {', '.join(sorted(keys))}")
    for key in raw:
        if type(raw[key]) not in known[key]:
            names = " or ".join(TYPE_NAMES[kind] for kind in known[key])
            raise ManifestError(f"{where}: {key} = {str(raw[key])[:40]!r}: expected {names}")
