"""Plain values of a header that may be hostile: text, numbers, ages, dates, codes.

Reads raw bytes itself, so that no library prints a value in a warning. Makes no decision about the image.
"""

import math
import re
import struct
from datetime import date

from pydicom.datadict import keyword_dict
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import Tag


def text(ds: Dataset, keyword: str) -> str:
    """Return the value as stripped text, "" when absent or empty; several values are joined by a backslash."""
    element = ds.get_item(Tag(keyword_dict[keyword]))
    if element is None or element.value is None:
        return ""
    value = element.value
    if isinstance(value, bytes):
        value = _decoded(ds, value)
    elif isinstance(value, (MultiValue, list, tuple)):
        value = "\\".join(str(part) for part in value)
    return "\\".join(part.strip(" \0") for part in str(value).split("\\")).strip(" \0")


def _decoded(ds: Dataset, value: bytes) -> str:
    charset = ds.get_item(Tag(0x00080005))
    unicode = charset is not None and b"ISO_IR 192" in (charset.value if isinstance(charset.value, bytes) else b"")
    return value.decode("utf-8" if unicode else "latin-1", errors="replace")


def values(ds: Dataset, keyword: str) -> tuple[str, ...]:
    """Return all values as stripped text, () when the element is absent or empty."""
    joined = text(ds, keyword)
    return tuple(joined.split("\\")) if joined else ()


def number(ds: Dataset, keyword: str) -> float | None:
    """Return the first value of a decimal or integer string, None when absent. Raises ValueError for text, inf, nan."""
    numbers = values(ds, keyword)
    if not numbers or not numbers[0]:
        return None
    value = float(numbers[0])
    if not math.isfinite(value):
        raise ValueError(f"{keyword} is not finite")
    return value


def shorts(ds: Dataset, keyword: str) -> tuple[int, ...]:
    """Return US or SS values as unsigned 16-bit numbers; the caller applies the sign."""
    element = ds.get_item(Tag(keyword_dict[keyword]))
    if element is None or element.value is None or element.value in (b"", ""):
        return ()
    if isinstance(element.value, bytes):
        order = "<" if getattr(element, "is_little_endian", True) else ">"
        return struct.unpack(f"{order}{len(element.value) // 2}H", element.value[: len(element.value) // 2 * 2])
    decoded = element.value if isinstance(element.value, (MultiValue, list, tuple)) else [element.value]
    return tuple(int(value) & 0xFFFF for value in decoded)


def short(ds: Dataset, keyword: str) -> int | None:
    """Return the first US or SS value as an unsigned 16-bit number, None when absent."""
    return (shorts(ds, keyword) or (None,))[0]


def codes(ds: Dataset, keyword: str) -> tuple[str, ...]:
    """Return the code values of a code sequence."""
    if Tag(keyword_dict[keyword]) not in ds:
        return ()
    return tuple(code for code in (text(item, "CodeValue") for item in ds[keyword_dict[keyword]].value) if code)


def day(ds: Dataset, keyword: str) -> date | None:
    """Return the date of a DA or DT element, None when it is absent or not a date."""
    return parse_day(text(ds, keyword)[:10])


def parse_day(stamp: str) -> date | None:
    """Return the date of a DA value (YYYYMMDD, or the older YYYY.MM.DD), None when it is not a date."""
    match = re.fullmatch(r"(\d{4})\.?(\d\d)\.?(\d\d)", stamp)
    try:
        return date(*map(int, match.groups())) if match else None
    except ValueError:
        return None


def age_years(ds: Dataset) -> float | None:
    """Return PatientAge in years (nnnD/W/M/Y, or bare years), else study date minus birth date, else None."""
    match = re.fullmatch(r"(\d{1,3})([DWMY]?)", text(ds, "PatientAge").upper())
    # consoles write 000Y for an unknown age; the age of a newborn is in days or weeks
    if match and not (int(match[1]) == 0 and match[2] in ("Y", "")):
        return int(match[1]) / {"D": 365.25, "W": 52.18, "M": 12, "Y": 1, "": 1}[match[2]]
    born, taken = day(ds, "PatientBirthDate"), day(ds, "StudyDate") or day(ds, "AcquisitionDate")
    if born is None or taken is None or not 0 <= (taken - born).days < 130 * 366:
        return None
    return (taken - born).days / 365.25


def acquired_at(ds: Dataset) -> str | None:
    """Return, as ISO 8601, the first valid time of acquisition, content or study; None without any.

    The time is local to the device; it has an offset from UTC only where the header has one.
    """
    pairs = [
        ("AcquisitionDateTime", ""),
        ("AcquisitionDate", "AcquisitionTime"),
        ("ContentDate", "ContentTime"),
        ("StudyDate", "StudyTime"),
    ]
    for day_keyword, time_keyword in pairs:
        stamp = text(ds, day_keyword).replace(".", "", 2 if time_keyword else 0)
        if time_keyword:
            stamp = stamp[:8] + text(ds, time_keyword).replace(":", "") if len(stamp) >= 8 else ""
        iso = _iso(stamp, text(ds, "TimezoneOffsetFromUTC"))
        if iso:
            return iso
    return None


def _iso(stamp: str, offset: str) -> str | None:
    match = re.match(r"(\d{4})(\d\d)(\d\d)(?:(\d\d)(\d\d)?(\d\d)?)?(?:\.\d*)?([+-]\d{4})?", stamp)
    if not match:
        return None
    year, month, day_of_month, hour, minute, second, own_offset = match.groups()
    try:
        date(int(year), int(month), int(day_of_month))
    except ValueError:
        return None
    if int(hour or 0) > 23 or int(minute or 0) > 59 or int(second or 0) > 60:
        return None
    zone = own_offset or (offset if re.fullmatch(r"[+-]\d{4}", offset) else "")
    seconds = min(int(second or 0), 59)  # 60 is a leap second
    clock = f"T{hour or '00'}:{minute or '00'}:{seconds:02d}" + (f"{zone[:3]}:{zone[3:]}" if zone else "")
    return f"{year}-{month}-{day_of_month}" + (clock if hour else "")
