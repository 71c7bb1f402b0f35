"""The .npy body of a request: exactly uint8 [N, 512, 512], checked before anything is allocated.

Rejects pickles, Fortran order and every form that numpy would have to guess.
"""

import io
from math import prod

import numpy as np

from cxrloop.npy import HEADER_LOCK
from cxrloop.plate import PLATE_SHAPE, PLATE_SIDE
from deploy.errors import BadBody

MAX_PLATES = 64  # 16 MiB; an intake step sends fewer
PLATE_BYTES = PLATE_SIDE * PLATE_SIDE
MAX_BODY = MAX_PLATES * PLATE_BYTES + 4096  # an .npy header is 128 bytes; 4096 leaves room for other writers
EXPECTED = f"expected an .npy of uint8 [N, {PLATE_SIDE}, {PLATE_SIDE}], 1 <= N <= {MAX_PLATES}, C order"
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_plates(body: bytes) -> np.ndarray:
    """Return uint8 [N, 512, 512], a view of `body`; BadBody says what was got and what is expected."""
    file = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(file)
        with HEADER_LOCK:
            shape, fortran, dtype = HEADERS[version](file)
    except (ValueError, KeyError) as wrong:
        raise BadBody(f"got {len(body)} bytes that are not .npy ({wrong}); {EXPECTED}") from None
    good = dtype == np.uint8 and len(shape) == 3 and shape[1:] == PLATE_SHAPE and 1 <= shape[0] <= MAX_PLATES
    if not good or fortran:
        raise BadBody(f"got {dtype} {list(shape)}{' in Fortran order' if fortran else ''}; {EXPECTED}")
    start = file.tell()
    if len(body) - start != prod(shape):
        raise BadBody(f"got {len(body) - start} bytes of data for {list(shape)}; {EXPECTED}")
    return np.frombuffer(body, np.uint8, offset=start).reshape(shape)
