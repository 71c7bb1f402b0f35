"""De-identify real headers: count the names, ids, dates, UIDs and free texts that remain, and check that DICOM stays valid.

Reads every file under DIR. With dciodvfy installed it compares the errors before and after. The result holds sums only,
no content of a header.

    python bench/privacy/deidentify.py DIR [--out bench/results/deidentify.json]
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import results
from dicom.dataset.chest_codes import CHEST, VIEWS
from dicom.dataset.part10 import Unreadable, open_envelope, read_header
from dicom.errors import NotExportable
from dicom.outgoing.deidentify import METHOD, METHOD_CODES, WORDS, clean_header, deidentify

KEY = b"a key for this bench, 32 bytes.."
TEXT = ("AE", "PN", "LO", "SH", "ST", "LT", "UT", "UC", "UR", "DA", "DT", "TM", "UI", "UN", "OB")
SHORTEST = 4  # characters; shorter texts match by chance
# words that the de-identification writes into every file
OURS = " ".join(
    [*METHOD, *sum(METHOD_CODES, ()), *CHEST, *VIEWS["PA"], *VIEWS["AP"], "CHEST", *sum(WORDS.values(), ())]
)


def texts(ds: Dataset) -> Iterator[bytes]:
    """Yield every name, id, date, UID and free text, at any depth, private elements included."""
    for element in ds:
        if element.VR == "SQ":
            for item in element.value or []:
                yield from texts(item)
        elif element.VR in TEXT and element.tag.group != 0x7FE0:
            raw = element.value
            values = raw if isinstance(raw, (list, MultiValue)) else [raw]
            for value in values:
                if isinstance(value, bytes):
                    yield from re.findall(rb"[ -~]{6,}", value)[:50]
                else:
                    yield from (part.encode() for part in re.split(r"[\^\r\n]", str(value)))


def leaks(source: Path, clean: Path) -> tuple[int, int]:
    """Return (texts searched for, texts that remain) in all bytes of the new file except its pixels."""
    bare, buffer = pydicom.dcmread(clean, stop_before_pixels=True), io.BytesIO()
    bare.save_as(buffer, enforce_file_format=True)
    wanted = {t.strip(b" \0") for t in texts(pydicom.dcmread(source, force=True))}
    wanted = {
        t
        for t in wanted
        if len(t) >= SHORTEST and t.decode("latin-1") not in OURS and not t.startswith(b"1.2.840.10008")
    }
    return len(wanted), sum(t in buffer.getvalue() for t in wanted)


def header_alone(path: Path) -> Dataset | None:
    """Return the cleaned header of a file that is not exported for another reason; None if it can't be read."""
    with path.open("rb") as stream:
        try:
            ds = read_header(stream, open_envelope(stream).transfer_syntax).dataset
            return clean_header(ds, "PA", KEY) if "SOPClassUID" in ds else None
        except (Unreadable, ValueError):
            return None


def errors(path: Path) -> set[str]:
    """Return the errors that dciodvfy reports."""
    done = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, errors="replace")
    return {line for line in (done.stderr + done.stdout).splitlines() if line.startswith("Error")}


def row(path: Path, scratch: Path) -> tuple[str, str, dict[str, int]]:
    """Return (reason why it is not exported or "", new errors one a line, counts) of one file."""
    why, new, before = "", set[str](), set[str]()
    try:
        out = deidentify(path, KEY)
    except NotExportable as refusal:
        why, out = f"not exported: {refusal}", header_alone(path)
    if out is None:
        return why, "", {}
    out.save_as(scratch, enforce_file_format=True)
    looked, left = leaks(path, scratch)
    if not why and shutil.which("dciodvfy"):
        before = errors(path)
        new = errors(scratch) - before
    numbers = {"texts": looked, "left": left, "errors_before": len(before), "new_errors": len(new)}
    return why, "\n".join(sorted(new)), numbers


def main() -> int:
    """Print the table and write the sums; return 1 if a text remained or a file became invalid."""
    parser = results.parser(__doc__, "deidentify.json")
    parser.add_argument("folder", type=Path, metavar="DIR")
    options = parser.parse_args()
    sums = dict.fromkeys(("files", "images", "headers_alone", "texts", "left", "errors_before", "new_errors"), 0)
    print(f"{'file':44} {'texts':>6} {'left':>5} {'errors before':>14} {'new errors':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(p for p in options.folder.rglob("*") if p.is_file() and p.suffix not in (".csv", ".md")):
            why, lines, numbers = row(path, Path(folder) / "clean.dcm")
            print(f"{path.relative_to(options.folder)!s:44}", end=" ")
            print(
                "{texts:6} {left:5} {errors_before:14} {new_errors:11}".format(**numbers) if numbers else " " * 39, why
            )
            print(lines, end="\n" if lines else "")
            sums["files"] += 1
            sums["images"] += not why
            sums["headers_alone"] += bool(why and numbers)
            for name, value in numbers.items():
                sums[name] += value
    print(sums)
    results.write(options.out, sums)
    return 1 if sums["left"] or sums["new_errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
