"""What decoding an image costs in each transfer syntax: ours, pylibjpeg, pydicom's default and dcmtk's tools, in one run.

`python bench/node/decode.py [--image FILE] [--rounds 5] [--images 8]` (dcmtk on the path) transcodes one real image (by default
pydicom-data's RG1, 1955 x 1841) into every syntax with other people's encoders, then times decoders in turn, from the
file to stored values, and whole images through the pool of 1 and 2 workers. Writes bench/results/decode.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import imagecodecs
import numpy as np
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.pixels.utils import pixel_array
from pydicom.uid import JPEG2000, JPEG2000Lossless

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dicom.dataset.part10 import items
from dicom.dataset.syntaxes import HTJ2K_LOSSLESS
from dicom.intake.examine import Admission
from dicom.intake.examiner import Examiner
from dicom.pixels import quality_filter
from dicom.pixels.plate import decode, pixel_sha256, render

RESULT = Path(__file__).resolve().parents[2] / "bench" / "results" / "decode.json"
KEY = b"a key for benches only, 32 bytes"
# name: (who writes it, who of dcmtk reads it, are all stored values kept)
SYNTAXES = {
    "explicit little endian": ("dcmconv +te", "dcmconv +te", True),
    "implicit little endian": ("dcmconv +ti", "dcmconv +te", True),
    "explicit big endian": ("dcmconv +tb", "dcmconv +te", True),
    "deflated": ("dcmconv +td", "dcmconv +te", True),
    "RLE": ("dcmcrle", "dcmdrle", True),
    "JPEG lossless SV1": ("dcmcjpeg +e1", "dcmdjpeg", True),
    "JPEG lossless, process 14": ("dcmcjpeg +el +sv 6", "dcmdjpeg", True),
    "JPEG baseline, 8 bit": ("dcmcjpeg +eb", "dcmdjpeg", False),
    "JPEG extended, 12 bit": ("dcmcjpeg +ee +bt", "dcmdjpeg", False),
    "JPEG-LS lossless": ("dcmcjpls", "dcmdjpls", True),
    "JPEG-LS near-lossless": ("dcmcjpls +en", "dcmdjpls", False),
    "JPEG 2000 lossless": ("openjpeg", None, True),
    "JPEG 2000 lossy, 10:1": ("openjpeg 10", None, False),
    "HTJ2K lossless": ("openjph", None, True),
}


def transcode(source: Path, target: Path, writer: str) -> None:
    if writer.startswith("dcm"):
        command, *options = writer.split()
        # where loss is meant, 8 and 12 bit want the image's values first cut to as many bits: dcmtk does it, and says so
        subprocess.run([command, *options, source, target], check=True, stderr=subprocess.DEVNULL)
        return
    ds = dcmread(source)
    if writer == "openjph":
        ds.PixelData = encapsulate([imagecodecs.htj2k_encode(ds.pixel_array, reversible=True)])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        ds.file_meta.TransferSyntaxUID = HTJ2K_LOSSLESS
    elif writer == "openjpeg":
        ds.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    else:
        ds.compress(JPEG2000, j2k_cr=[10], encoding_plugin="pylibjpeg", generate_instance_uid=False)
    ds.save_as(target, enforce_file_format=True)


def decoders(path: Path, reader: str | None, scratch: Path) -> dict[str, Callable[[], np.ndarray]]:
    """From the file to stored values, by whom; dcmtk's includes starting its process and writing a plain file."""

    def by_dcmtk() -> np.ndarray:
        subprocess.run([*str(reader).split(), path, scratch], check=True, stderr=subprocess.DEVNULL)
        return pixel_array(dcmread(scratch), raw=True)

    found = {
        "ours": lambda: decode(dcmread(path)),
        "pylibjpeg": lambda: pixel_array(dcmread(path), raw=True, decoding_plugin="pylibjpeg"),
        "pydicom": lambda: pixel_array(dcmread(path), raw=True),
    }
    return found | ({"dcmtk": by_dcmtk} if reader else {})


def one_by_one(files: dict[str, Path], folder: Path, rounds: int) -> dict[str, dict]:
    """ms of each decoder by syntax (medians over interleaved rounds), and how far their values lie apart."""
    original = pixel_array(dcmread(files["explicit little endian"]), raw=True).astype(np.int32)
    rows = {}
    for name, path in files.items():
        reader, lossless = SYNTAXES[name][1:]
        who = decoders(path, reader, folder / "plain.dcm")
        seconds: dict[str, list[float]] = {one: [] for one in who}
        values: dict[str, np.ndarray] = {}
        for _ in range(rounds):
            for one in list(who):
                began = time.perf_counter()
                try:
                    values[one] = who[one]().astype(np.int32)
                except (RuntimeError, AttributeError, NotImplementedError, ValueError) as error:
                    del who[one]
                    seconds[one] = []
                    print(f"{name}: {one} can't: {type(error).__name__}")
                    continue
                seconds[one].append(time.perf_counter() - began)
        others = [values[one] for one in values if one != "ours"]
        rows[name] = {
            "bytes": path.stat().st_size,
            "ms": {one: round(median(taken) * 1000, 1) if taken else None for one, taken in seconds.items()},
            "exact": bool((values["ours"] == original).all()) if lossless else None,
            "furthest_from_others": max(int(np.abs(values["ours"] - other).max()) for other in others),
        }
    return rows


def through_the_pool(files: dict[str, Path], images: int, rounds: int) -> dict[str, dict]:
    """Images a second from file to plate, hash and quality answer, with 1 and 2 worker processes, interleaved."""
    rates: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in files}
    pools = {n: Examiner(KEY, Admission(children=True, quality=True), workers=n) for n in (1, 2)}
    try:
        for pool in pools.values():  # the processes start, codecs and weights are loaded
            list(pool.examine([files["RLE"]] * 4))
        for _ in range(rounds):
            for name, path in files.items():
                for workers, pool in pools.items():
                    began = time.perf_counter()
                    outcomes = {found.outcome for _, found in pool.examine([path] * images)}
                    rates[name][workers].append(images / (time.perf_counter() - began))
                    if outcomes != {"admitted"}:
                        raise SystemExit(f"{name}: {outcomes}, expected a chest image that is admitted")
    finally:
        for pool in pools.values():
            pool.close()
    return {name: {str(n): round(median(taken), 2) for n, taken in by.items()} for name, by in rates.items()}


def stages(path: Path, rounds: int) -> dict[str, float]:
    """ms of each step after reading an uncompressed image."""
    ds = dcmread(path)
    stored = decode(ds)
    plate = render(ds, stored)
    steps = {
        "stored values": lambda: decode(ds),
        "hash of the stored values": lambda: pixel_sha256(stored),
        "plate": lambda: render(ds, stored),
        "quality": lambda: quality_filter.fault(plate),
    }
    found = {}
    for name, step in steps.items():
        found[name] = round(median(_seconds(step) for _ in range(rounds)) * 1000, 2)
    return found


def jpeg_2000(path: Path, rounds: int) -> dict[str, float]:
    """ms for one lossless code stream on one and on two threads, in turn: the slowest of all, and what we do about it."""
    stream = b"".join(items(dcmread(path).PixelData)[1:])
    taken: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for threads, seconds in taken.items():
            seconds.append(_seconds(lambda n=threads: imagecodecs.jpeg2k_decode(stream, numthreads=n)))
    return {f"{threads} thread{'s' * (threads > 1)}": round(median(s) * 1000, 1) for threads, s in taken.items()}


def _seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def show(result: dict) -> None:
    head = ("ours", "pylibjpeg", "pydicom", "dcmtk")
    print(
        f"\n{'':28}{'MB':>6}"
        + "".join(f"{one:>11}" for one in head)
        + f"{'exact':>7}{'off':>5}{'1 worker':>10}{'2':>7}"
    )
    for name, row in result["syntaxes"].items():
        times = "".join(f"{'-' if row['ms'].get(one) is None else row['ms'][one]:>11}" for one in head)
        exact = "lossy" if row["exact"] is None else "yes" if row["exact"] else "NO"
        rate = result["images_a_second"][name]
        off = row["furthest_from_others"]
        print(f"{name:28}{row['bytes'] / 1e6:6.1f}{times}{exact:>7}{off:5}{rate['1']:10}{rate['2']:7}")
    print("ms (median); off: largest difference to another decoder; images a second from file to plate by workers")
    print("stages, ms:", result["stages_ms"], "\nJPEG 2000 lossless, ms:", result["jpeg_2000_ms"])


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, help="an uncompressed chest image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=8, help="images through the pool at a time")
    options = parser.parse_args()
    source = options.image or Path(get_testdata_file("RG1_UNCR.dcm", download=False))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {name: folder / f"{number}.dcm" for number, name in enumerate(SYNTAXES)}
        for name, path in files.items():
            transcode(source, path, SYNTAXES[name][0])
        ds = dcmread(source)
        result = {
            "image": f"{ds.Rows} x {ds.Columns}, {ds.BitsStored} of {ds.BitsAllocated} bits",
            "rounds": options.rounds,
            "cores": os.cpu_count(),
            "imagecodecs": imagecodecs.__version__,
            "syntaxes": one_by_one(files, folder, options.rounds),
            "images_a_second": through_the_pool(files, options.images, max(1, options.rounds // 2)),
            "stages_ms": stages(files["explicit little endian"], options.rounds),
            "jpeg_2000_ms": jpeg_2000(files["JPEG 2000 lossless"], options.rounds),
        }
    show(result)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
