"""A round folder: the manifest read strictly, and everything the learner writes, whole or not at all.

Refuses a golden image, a patient in two ranges and plates of another version at load, by rule and not by convention.
Knows no torch: numpy and the standard library only, so that the agent can read a round's state with it.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

import numpy as np

from learner.round.recipe import Recipe, RecipeError

PLATE_VERSION = 1  # must equal the version of the plates in the manifest; a change of the pixel path raises both
PLATE_SHAPE = (512, 512)
RANGES = ("train", "validation", "calibration")
_HEADER = threading.Lock()  # numpy reads headers with `ast`, which threads break up to CPython 3.12 (gh-106905)
VERSION = 2  # of the manifest
KEYS = {  # of the manifest, and the kinds of value that each may have
    "version": (int,), "round": (str,), "plate_version": (int,), "findings": (list,), "recipe": (dict,), "seed": (int,),
    "plates": (str,), "parent": (dict, NoneType), "until": (str, NoneType), "images": (list,),
}  # fmt: skip
SAMPLE_KEYS = {
    "image": (int,), "patient": (str, int), "plate": (str,), "range": (str,), "labels": (list, NoneType),
}  # fmt: skip
PARENT_KEYS = {"bundle": (str,), "state": (str,)}
NAMES = {int: "a whole number", str: "a text", list: "a list", dict: "an object", NoneType: "null"}

TRAINED, PAUSED, STOPPED = 0, 75, 3  # exit codes of `python -m learner`


class ManifestError(ValueError):
    """The manifest can't be trained on: says what, which and what to do."""


class RoundBusy(RuntimeError):
    """Another learner holds this round folder."""


@dataclass(frozen=True)
class Sample:
    """One plate and what is known of it; labels[f] is 1, 0 or None (unknown)."""

    image: int
    patient: str
    plate: Path
    range: str
    labels: tuple[int | None, ...]

    @property
    def labelled(self) -> bool:
        return any(v is not None for v in self.labels)


@dataclass(frozen=True)
class Round:
    """A manifest that has been checked."""

    folder: Path
    name: str
    findings: tuple[str, ...]
    recipe: Recipe
    parent: str | None
    parent_state: Path | None
    until: datetime | None
    samples: tuple[Sample, ...]
    fingerprint: str  # of all that decides the result: everything but `until`

    def of(self, range_: str) -> tuple[Sample, ...]:
        return tuple(f for f in self.samples if f.range == range_)

    @property
    def unlabelled(self) -> tuple[Sample, ...]:
        """The unlabelled pool: every train image, the labelled ones too, used without their labels."""
        return self.of("train")

    @property
    def labelled(self) -> tuple[Sample, ...]:
        return tuple(f for f in self.of("train") if f.labelled)


def write(
    folder: Path, *, plate_version: int, findings: Sequence[str], recipe: Recipe, seed: int, plates: str,
    parent: tuple[str, str] | None, images: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Write the manifest of a new round into its folder, which has the round's name.

    `plates`: the folder of the plates, and the second of `parent` (bundle, its training state), relative to `folder`.
    """
    document = {
        "version": VERSION, "round": folder.name, "plate_version": plate_version, "findings": list(findings),
        "recipe": recipe.to_dict(), "seed": seed, "plates": plates,
        "parent": {"bundle": parent[0], "state": parent[1]} if parent else None, "until": None, "images": images,
    }  # fmt: skip
    write_json(folder / "manifest.json", document)


def read_raw(folder: Path) -> dict[str, Any]:
    """Return the manifest with the keys of today's version, unchecked; empty when there is none (yet)."""
    return _of_today(read_json(folder / "manifest.json"))


def set_until(folder: Path, until: str | None) -> None:
    """Change when the round must pause (ISO 8601 text, or None). The rest stays, so that its checkpoint stays valid."""
    document = read_json(folder / "manifest.json")
    if document["until"] != until:
        write_json(folder / "manifest.json", document | {"until": until})


def load(folder: Path) -> Round:
    """Read and check `folder/manifest.json`; raises ManifestError."""
    path = folder / "manifest.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ManifestError(f"{path}: no manifest; the agent writes it before the learner starts") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ManifestError(f"{path}: not JSON ({error})") from None
    decides = (
        json.dumps({k: v for k, v in raw.items() if k != "until"}, sort_keys=True) if isinstance(raw, dict) else ""
    )
    raw = _of_today(raw)
    _same_keys("manifest", raw, KEYS)
    if raw["version"] != VERSION:
        raise ManifestError(f"manifest: version {raw['version']!r}; this learner reads versions 1 and {VERSION}")
    if raw["plate_version"] != PLATE_VERSION:
        raise ManifestError(
            f"manifest: plate_version {raw['plate_version']!r}, this learner was made for {PLATE_VERSION}: "
            "make the plates again from the originals"
        )
    findings = tuple(raw["findings"])
    if not findings or not all(isinstance(f, str) and f for f in findings) or len(set(findings)) != len(findings):
        raise ManifestError(f"manifest: findings {raw['findings']!r}: needs at least one name, each once")
    try:
        recipe = Recipe.from_dict(raw["recipe"]).override({"seed": raw["seed"]})
    except RecipeError as error:
        raise ManifestError(f"manifest: {error}") from None
    samples = _samples(raw["images"], folder / raw["plates"], len(findings))
    parent, state = _parent(raw["parent"], folder)
    return Round(
        folder=folder, name=raw["round"], findings=findings, recipe=recipe, parent=parent, parent_state=state,
        until=_until(raw["until"]), samples=samples, fingerprint=hashlib.sha256(decides.encode()).hexdigest(),
    )  # fmt: skip


def _of_today(raw: Any) -> Any:
    """A manifest of version 1 (cxrloop 0.1 called the images films) in the keys of today; any other as it is."""
    if isinstance(raw, dict) and raw.get("version") == 1 and "films" in raw:
        return {**{k: v for k, v in raw.items() if k != "films"}, "version": VERSION, "images": raw["films"]}
    return raw


def _samples(rows: Any, plates: Path, width: int) -> tuple[Sample, ...]:
    if not rows:
        raise ManifestError("manifest: images is empty; a round needs train images")
    samples, range_of, seen = [], {}, set()
    for number, row in enumerate(rows):
        where = f"manifest: images[{number}]"
        _same_keys(where, row, SAMPLE_KEYS)
        if row["range"].startswith("golden"):
            raise ManifestError(f"{where}: image {row['image']} is {row['range']}: a golden image is never trained on")
        if row["range"] not in RANGES:
            raise ManifestError(f"{where}: range {row['range']!r}; must be one of {', '.join(RANGES)}")
        _one_range(where, row, range_of)
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
        samples.append(Sample(row["image"], str(row["patient"]), plates / relative, row["range"], labels))
    if not any(f.range == "train" for f in samples):
        raise ManifestError("manifest: no image in range train")
    return tuple(samples)


def _one_range(where: str, row: dict[str, Any], range_of: dict[str, str]) -> None:
    first = range_of.setdefault(str(row["patient"]), row["range"])
    if first != row["range"]:
        raise ManifestError(f"{where}: patient {row['patient']} is in {first} and in {row['range']}; split by patient")


def _parent(raw: Any, folder: Path) -> tuple[str | None, Path | None]:
    if raw is None:
        return None, None
    _same_keys("manifest: parent", raw, PARENT_KEYS)
    state = folder / raw["state"]
    if not state.is_file():
        raise ManifestError(f"manifest: parent {raw['bundle']}: {state} is missing; start from null or restore it")
    return raw["bundle"], state


def _until(raw: Any) -> datetime | None:
    if raw is None:
        return None
    try:
        until = datetime.fromisoformat(raw)
    except ValueError:
        raise ManifestError(f"manifest: until {raw!r}: not an ISO 8601 time in UTC") from None
    return until if until.tzinfo else until.replace(tzinfo=UTC)


def _same_keys(where: str, raw: Any, kinds: dict[str, tuple[type, ...]]) -> None:
    """These keys and no others, each of one of its kinds; True is no number here."""
    if not isinstance(raw, dict):
        raise ManifestError(f"{where}: expected an object with {', '.join(sorted(kinds))}")
    for word, wrong in (("missing", set(kinds) - set(raw)), ("unknown", set(raw) - set(kinds))):
        if wrong:
            raise ManifestError(f"{where}: {word} {', '.join(sorted(wrong))}")
    for key, allowed in kinds.items():
        if type(raw[key]) not in allowed:
            names = " or ".join(NAMES[kind] for kind in allowed)
            raise ManifestError(f"{where}: {key} = {str(raw[key])[:40]!r}: expected {names}")


def read_plate(path: Path) -> np.ndarray:
    """uint8 [512, 512]; raises ManifestError for a missing file or another shape."""
    try:
        with _HEADER:
            plate = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ManifestError(f"{path}: not a plate ({error})") from None
    if not isinstance(plate, np.ndarray):
        raise ManifestError(f"{path}: an archive of arrays; a plate is one array, uint8 {list(PLATE_SHAPE)}")
    if plate.shape != PLATE_SHAPE or plate.dtype != np.uint8:
        raise ManifestError(f"{path}: {plate.dtype} {list(plate.shape)}; a plate is uint8 {list(PLATE_SHAPE)}")
    return np.array(plate)


def write_atomic(path: Path, data: bytes) -> None:
    """The whole file or none of it: temp, fsync, rename, fsync of the folder."""
    temp = path.with_name(f".{path.name}.tmp")
    try:
        with temp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temp.unlink(missing_ok=True)  # a half of it would keep a full disk full
        raise
    temp.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def write_last_word(folder: Path, value: Any) -> None:
    """`result.json`; on a full disk in the block of `progress.json`, which nobody else can take in between."""
    data = (json.dumps(value, indent=1) + "\n").encode()
    try:
        write_atomic(folder / "result.json", data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not (folder / "progress.json").exists():
            raise
        temp = (folder / "progress.json").replace(folder / ".result.json.tmp")
        with temp.open("r+b") as file:
            file.write(data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        temp.replace(folder / "result.json")
        sync_folder(folder)


def read_json(path: Path) -> dict[str, Any]:
    """An object that was written whole; empty when the file isn't there (yet)."""
    return json.loads(path.read_text()) if path.exists() else {}


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well; what a crash left over is removed first."""
    temp = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    try:
        yield temp
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)  # a half of it would keep a full disk full
        raise
    for file in temp.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    temp.replace(target)
    sync_folder(target.parent)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the round: one learner at a time, released by the kernel whatever ends the process; raises RoundBusy."""
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RoundBusy(f"{folder}: another learner is at work here") from None
        yield
