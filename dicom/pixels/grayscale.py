"""The grayscale pipeline of one header: a table from stored value to brightness, 0 black to 1 white.

Modality LUT, then VOI LUT or window or percentiles, then polarity, then padding to black (PS3.3 C.11, PS3.4 N.2).
Works on the histogram of an image, never on its pixels.
"""

import numpy as np
from pydicom.dataset import Dataset

from dicom.dataset import header
from dicom.errors import BlankImage

TAILS = (0.005, 0.995)  # without a window; burned-in markers and collimator edges cover less than half a per cent


def brightness(ds: Dataset, lowest: int, counts: np.ndarray, windowed: bool = True) -> np.ndarray:
    """Return float64 [len(counts)] in 0..1 for the stored values lowest, lowest + 1, ...; `counts` is their histogram.

    `windowed` False ignores the header's VOI LUT and window. Raises BlankImage, ValueError.
    """
    stored = np.arange(lowest, lowest + len(counts))
    padding = _padding(ds, stored)
    weights = np.where(padding, 0, counts)
    if np.count_nonzero(weights) < 2:
        raise BlankImage("PixelData (7FE0,0010): every pixel has the same value")
    values = _modality(ds, stored)
    low, high = _percentiles(values, weights)
    if low == high:
        raise BlankImage(f"PixelData (7FE0,0010): {TAILS[1] - TAILS[0]:.0%} of the pixels have the same value")
    shown = _voi(ds, values) if windowed else None
    if shown is None:
        shown = np.clip((values - low) / (high - low), 0, 1)
    inverse = header.text(ds, "PhotometricInterpretation").upper() == "MONOCHROME1"
    # a DX image has both MONOCHROME1 and INVERSE (PS3.3 C.8.11.3): invert once, not twice
    if inverse or header.text(ds, "PresentationLUTShape").upper() == "INVERSE":
        shown = 1 - shown
    return np.where(padding, 0.0, shown)


def _is_signed(ds: Dataset) -> bool:
    return header.short(ds, "PixelRepresentation") == 1


def _signed(ds: Dataset, value: int) -> int:
    return value - 0x10000 if value > 0x7FFF and _is_signed(ds) else value


def _padding(ds: Dataset, stored: np.ndarray) -> np.ndarray:
    value = header.short(ds, "PixelPaddingValue")
    if value is None:
        return np.zeros(len(stored), bool)
    limit = header.short(ds, "PixelPaddingRangeLimit")
    ends = sorted((_signed(ds, value), _signed(ds, value if limit is None else limit)))
    return (stored >= ends[0]) & (stored <= ends[1])


def _modality(ds: Dataset, stored: np.ndarray) -> np.ndarray:
    if "ModalityLUTSequence" in ds and ds["ModalityLUTSequence"].value:
        return _lookup(ds, ds["ModalityLUTSequence"].value[0], stored)[0]
    slope, intercept = header.number(ds, "RescaleSlope"), header.number(ds, "RescaleIntercept")
    if slope == 0:
        raise ValueError("RescaleSlope (0028,1053) = 0")
    return stored * (1.0 if slope is None else slope) + (intercept or 0.0)


def _lookup(ds: Dataset, item: Dataset, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values mapped by one LUT item, and its table. Values outside the table map to its ends (C.11.1.1)."""
    descriptor = header.shorts(item, "LUTDescriptor")
    if len(descriptor) != 3:
        raise ValueError("LUTDescriptor (0028,3002) does not have three values")
    size, first = descriptor[0] or 0x10000, descriptor[1]
    vr = getattr(item.get_item(0x00283002), "VR", None)  # None or "US or SS" for an implicit file
    if first > 0x7FFF and (vr == "SS" or values.min() < 0 or (vr != "US" and _is_signed(ds))):
        first -= 0x10000  # signed if the input values are, whatever the stored values are (C.11.2.1.1)
    raw = item.get_item(0x00283006)
    if raw is not None and isinstance(raw.value, bytes) and len(raw.value) < 2 * size:
        packed = np.frombuffer(raw.value, "u1")  # 8-bit entries, two in a word
        if not getattr(raw, "is_little_endian", True) and raw.VR == "OW":
            packed = packed[: len(packed) // 2 * 2].reshape(-1, 2)[:, ::-1].ravel()
        table = packed.astype(np.float64)
    else:
        table = np.array(header.shorts(item, "LUTData"), np.float64)
    if len(table) < size:
        raise ValueError(f"LUTData (0028,3006) has {len(table)} of {size} entries")
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, size - 1)], table[:size]


def _voi(ds: Dataset, values: np.ndarray) -> np.ndarray | None:
    """Return 0..1 by the VOI LUT, else by the first window (C.11.2.1.2); None if the header has no valid one."""
    if "VOILUTSequence" in ds and ds["VOILUTSequence"].value:
        shown, table = _lookup(ds, ds["VOILUTSequence"].value[0], values)
        # divide by the table's largest entry: many declare 16 bits and use 12. Not by the image's brightest pixel
        return shown / table.max() if table.max() > table.min() else None
    try:
        centre, width = header.number(ds, "WindowCenter"), header.number(ds, "WindowWidth")
    except ValueError:
        return None
    function = header.text(ds, "VOILUTFunction").upper()
    least = 0 if function in ("SIGMOID", "LINEAR_EXACT") else 1  # LINEAR divides by width - 1
    if centre is None or width is None or width <= least:
        return None
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def _percentiles(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Return the two values below which the TAILS shares of the pixels lie."""
    order = np.argsort(values, kind="stable")
    share = np.cumsum(weights[order]) / weights.sum()
    low, high = np.searchsorted(share, TAILS)
    return float(values[order[low]]), float(values[order[min(high, len(order) - 1)]])
