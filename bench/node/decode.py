"""Time to decode an image in each transfer syntax: this node, pylibjpeg, pydicom's default and dcmtk, in one run.

    python bench/node/decode.py [--image FILE] [--rounds 5] [--images 8]

Needs dcmtk. Independent encoders write one real image (by default RG1 of pydicom-data, 1955 x 1841) in every syntax.
Then the decoders are timed in turn, from the file to stored values, and whole images through pools of 1 and 2 workers.
"""

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
from pydicom.uid import JPEG2000, UID, JPEG2000Lossless

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.common import machine, results
from dicom.dataset.part10 import items
from dicom.dataset.syntaxes import HTJ2K_LOSSLESS
from dicom.intake.examine import Admission
from dicom.intake.examiner import Examiner
from dicom.pixels import quality_filter
from dicom.pixels.plate import decode, pixel_sha256, render

KEY = b"a key for benches only, 32 bytes"
# name: (command or library that encodes it, dcmtk command that decodes it or None, whether it is lossless)
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
    """Write `source` in the syntax of a writer of SYNTAXES."""
    if writer.startswith("dcm"):
        command, *options = writer.split()
        # the lossy 8 and 12 bit encoders cut the values to as many bits; dcmtk warns about it on stderr
        subprocess.run([command, *options, source, target], check=True, stderr=subprocess.DEVNULL)
        return
    ds = dcmread(source)
    if writer == "openjph":
        ds.PixelData = encapsulate([imagecodecs.htj2k_encode(ds.pixel_array, reversible=True)])
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
        ds.file_meta.TransferSyntaxUID = UID(HTJ2K_LOSSLESS)
    elif writer == "openjpeg":
        ds.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    else:
        ds.compress(JPEG2000, j2k_cr=[10], encoding_plugin="pylibjpeg", generate_instance_uid=False)
    ds.save_as(target, enforce_file_format=True)


def decoders(path: Path, reader: str | None, scratch: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Return the decoders by name, each from the file to stored values; dcmtk's starts a process and writes a file."""

    def dcmtk_values() -> np.ndarray:
        subprocess.run([*str(reader).split(), path, scratch], check=True, stderr=subprocess.DEVNULL)
        return pixel_array(dcmread(scratch), raw=True)

    ways = {
        "ours": lambda: decode(dcmread(path)),
        "pylibjpeg": lambda: pixel_array(dcmread(path), raw=True, decoding_plugin="pylibjpeg"),
        "pydicom": lambda: pixel_array(dcmread(path), raw=True),
    }
    return ways | ({"dcmtk": dcmtk_values} if reader else {})


def compare_decoders(files: dict[str, Path], folder: Path, rounds: int) -> dict[str, dict]:
    """Return by syntax: ms of each decoder (medians over interleaved rounds), and the largest difference of values."""
    original = pixel_array(dcmread(files["explicit little endian"]), raw=True).astype(np.int32)
    rows = {}
    for name, path in files.items():
        reader, lossless = SYNTAXES[name][1:]
        ways = decoders(path, reader, folder / "plain.dcm")
        seconds: dict[str, list[float]] = {decoder: [] for decoder in ways}
        values: dict[str, np.ndarray] = {}
        for _ in range(rounds):
            for decoder in list(ways):
                began = time.perf_counter()
                try:
                    values[decoder] = ways[decoder]().astype(np.int32)
                except (RuntimeError, AttributeError, NotImplementedError, ValueError) as error:
                    del ways[decoder]
                    seconds[decoder] = []
                    print(f"{name}: {decoder} can't decode it: {type(error).__name__}")
                    continue
                seconds[decoder].append(time.perf_counter() - began)
        foreign = [values[decoder] for decoder in values if decoder != "ours"]
        rows[name] = {
            "bytes": path.stat().st_size,
            "ms": {decoder: round(median(taken) * 1000, 1) if taken else None for decoder, taken in seconds.items()},
            "exact": bool((values["ours"] == original).all()) if lossless else None,
            "furthest_from_others": max(int(np.abs(values["ours"] - theirs).max()) for theirs in foreign),
        }
    return rows


def pool_rates(files: dict[str, Path], images: int, rounds: int) -> dict[str, dict]:
    """Return images a second from file to plate, hash and quality, with 1 and 2 worker processes, interleaved."""
    rates: dict[str, dict[int, list[float]]] = {name: {1: [], 2: []} for name in files}
    pools = {n: Examiner(KEY, Admission(children=True, quality=True), workers=n) for n in (1, 2)}
    try:
        for pool in pools.values():  # start the processes, load codecs and weights
            list(pool.examine([files["RLE"]] * 4))
        for _ in range(rounds):
            for name, path in files.items():
                for workers, pool in pools.items():
                    began = time.perf_counter()
                    outcomes = {result.outcome for _, result in pool.examine([path] * images)}
                    rates[name][workers].append(images / (time.perf_counter() - began))
                    if outcomes != {"admitted"}:
                        raise SystemExit(f"{name}: {outcomes}, expected a chest image that is admitted")
    finally:
        for pool in pools.values():
            pool.close()
    return {name: {str(n): round(median(taken), 2) for n, taken in by.items()} for name, by in rates.items()}


def stage_times(path: Path, rounds: int) -> dict[str, float]:
    """Return the ms of each step after reading an uncompressed image."""
    ds = dcmread(path)
    stored = decode(ds)
    plate = render(ds, stored)
    steps = {
        "stored values": lambda: decode(ds),
        "hash of the stored values": lambda: pixel_sha256(stored),
        "plate": lambda: render(ds, stored),
        "quality": lambda: quality_filter.fault(plate),
    }
    milliseconds = {}
    for name, step in steps.items():
        milliseconds[name] = round(median(_seconds(step) for _ in range(rounds)) * 1000, 2)
    return milliseconds


def jpeg_2000_times(path: Path, rounds: int) -> dict[str, float]:
    """Return the ms of one lossless code stream, the slowest of all, on one and on two threads, in turn."""
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
    """Print the table."""
    head = ("ours", "pylibjpeg", "pydicom", "dcmtk")
    print(
        f"\n{'':28}{'MB':>6}"
        + "".join(f"{decoder:>11}" for decoder in head)
        + f"{'exact':>7}{'off':>5}{'1 worker':>10}{'2':>7}"
    )
    for name, row in result["syntaxes"].items():
        times = "".join(f"{'-' if row['ms'].get(decoder) is None else row['ms'][decoder]:>11}" for decoder in head)
        exact = "lossy" if row["exact"] is None else "yes" if row["exact"] else "NO"
        rate = result["images_a_second"][name]
        off = row["furthest_from_others"]
        print(f"{name:28}{row['bytes'] / 1e6:6.1f}{times}{exact:>7}{off:5}{rate['1']:10}{rate['2']:7}")
    print("ms (median); off: largest difference to another decoder; images a second from file to plate by workers")
    print("stages, ms:", result["stages_ms"], "\nJPEG 2000 lossless, ms:", result["jpeg_2000_ms"])


def main() -> None:
    """Encode, measure, print and write."""
    warnings.simplefilter("ignore")
    parser = results.parser(__doc__, "decode.json")
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
            "machine": machine.facts("imagecodecs"),
            "syntaxes": compare_decoders(files, folder, options.rounds),
            "images_a_second": pool_rates(files, options.images, max(1, options.rounds // 2)),
            "stages_ms": stage_times(files["explicit little endian"], options.rounds),
            "jpeg_2000_ms": jpeg_2000_times(files["JPEG 2000 lossless"], options.rounds),
        }
    show(result)
    results.write(options.out, result)


if __name__ == "__main__":
    main()
