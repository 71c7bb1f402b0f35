"""Images for tests, and plain helpers to send them over real sockets."""

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, build_context
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE

from dicom.dataset.facts import COMPUTED_RADIOGRAPHY
from dicom.dataset.part10 import EXPLICIT_LE, open_envelope
from dicom.phantom.wrap import wrap

KEY = b"a key for tests only, 32 bytes.."


def chest(side: int = 96, seed: int = 0, bits: int = 8) -> np.ndarray:
    """Return uint8 or uint16 [side, side]: two dark lungs in a grey body, with noise that depends on the seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    lungs = sum(np.exp(-(((x - centre) / 0.16) ** 2) - ((y - 0.45) / 0.3) ** 2) for centre in (0.3, 0.7))
    body = 0.75 - 0.55 * lungs + rng.normal(0, 0.02, (side, side))
    return (np.clip(body, 0, 1) * ((1 << bits) - 1)).astype(np.uint8 if bits == 8 else np.uint16)


def xray(seed: int = 0, side: int = 96, bits: int = 8, patient_id: str = "P1", **more: object) -> Dataset:
    """Return an image that every rule admits."""
    return wrap(chest(side, seed, bits), patient_id, bits=bits, **more)  # type: ignore[arg-type]


def save(ds: Dataset, path: Path) -> Path:
    """Write a data set as a file and return its path."""
    ds.save_as(path, enforce_file_format=True)
    return path


def data_set(ds: Dataset) -> bytes:
    """Return the encoded data set without its file meta, as it is sent."""
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    buffer.seek(0)
    return buffer.getvalue()[open_envelope(buffer).offset :]


def associate(port: int, kinds: list[tuple[str, str]], called: str = "CXRLOOP", calling: str = "TEST") -> Association:
    """Return an association that proposes each (SOP class, syntax) in its own context."""
    entity = AE(calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 20
    contexts = [build_context(sop_class, [syntax]) for sop_class, syntax in kinds]
    return entity.associate("127.0.0.1", port, contexts=contexts, ae_title=called)


def store_raw(
    association: Association, data: bytes, sop_uid: str, sop_class: str = COMPUTED_RADIOGRAPHY, context: int = 1
) -> int | None:
    """Send any bytes under any C-STORE command and return the status; None when the peer closed the connection."""
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    # bypass the library's checks, as hostile senders do
    request._affected_sop_class_uid, request._affected_sop_instance_uid = UID(sop_class), UID(sop_uid)
    request.DataSet = io.BytesIO(data)
    association._reactor_checkpoint.clear()
    while not association._is_paused:
        time.sleep(0.0005)
    identifiers = [cx.context_id for cx in association.accepted_contexts]
    association.dimse.send_msg(request, context if context in identifiers else identifiers[0])
    _, response = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    return None if response is None else response.Status


def send_once(port: int, data: bytes, sop_uid: str, sop_class: str, syntax: str = EXPLICIT_LE) -> int | None:
    """Send one object on its own association and return the status."""
    association = associate(port, [(sop_class, syntax)])
    assert association.is_established
    try:
        return store_raw(association, data, sop_uid, sop_class)
    finally:
        association.release()


def wait_for(condition: Callable[[], object], seconds: float = 10) -> bool:
    """Return True as soon as the condition is true, False if it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())
