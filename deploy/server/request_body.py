"""The .npy body of a request: exactly uint8 [N, 512, 512], checked before anything is allocated.

Refuses pickles, Fortran order and whatever numpy would guess; refuses to know HTTP.
"""

import io
from math import prod

import numpy as np

from deploy.bundle.contract import HEADER, PLATE_SIDE

MAX_PLATES = 64  # 16 MiB; an intake step asks for fewer
PLATE_BYTES = PLATE_SIDE * PLATE_SIDE
MAX_BODY = MAX_PLATES * PLATE_BYTES + 4096  # an .npy header is 128 bytes; 4096 leaves room for other writers
EXPECTED = f"expected an .npy of uint8 [N, {PLATE_SIDE}, {PLATE_SIDE}], 1 <= N <= {MAX_PLATES}, C order"
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class BadBody(Exception):
    """A body that is not plates; says what was got and what is expected."""


def read_plates(body: bytes) -> np.ndarray:
    """uint8 [N, 512, 512], a view of `body`; BadBody."""
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        with HEADER:
            shape, fortran, dtype = HEADERS[version](file)
    except (ValueError, KeyError) as wrong:
        raise BadBody(f"got {len(body)} bytes that are no .npy ({wrong}); {EXPECTED}") from None
    good = (
        dtype == np.uint8 and len(shape) == 3 and shape[1:] == (PLATE_SIDE, PLATE_SIDE) and 1 <= shape[0] <= MAX_PLATES
    )
    if not good or fortran:
        raise BadBody(f"got {dtype} {list(shape)}{' in Fortran order' if fortran else ''}; {EXPECTED}")
    start = file.tell()
    if len(body) - start != prod(shape):
        raise BadBody(f"got {len(body) - start} bytes of data for {list(shape)}; {EXPECTED}")
    return np.frombuffer(body, np.uint8, offset=start).reshape(shape)
