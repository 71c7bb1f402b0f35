"""Client of the model server on loopback HTTP; an answer names the bundle that computed it.

Must not import httpx, and numpy only to score: `status` sends one request, and loading them would take longer.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import numpy as np

from deploy.errors import ServerDown, ServerRefused

CONNECT_S, ANSWER_S, LOAD_S = 2.0, 60.0, 300.0  # a large bundle on a busy GPU can load for minutes


class Client:
    """A server by its URL (`http://127.0.0.1:8123`); safe in several threads; close it or use `with`.

    Every request raises ServerDown or ServerRefused, except `state` and `ready`. Plain HTTP, one connection a request; the
    proxies of the environment are never used, so that no plate leaves the machine.
    """

    def __init__(self, url: str, timeout: float = ANSWER_S):
        self.url, self.timeout = url, timeout
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 80

    def predict(self, plates: np.ndarray) -> tuple[str, tuple[str, ...], np.ndarray]:
        """Return (bundle, findings, probabilities float64 [N, F]) of plates uint8 [N, 512, 512]."""
        answer = self._ask("POST", "/predict", _npy(plates))
        return answer["bundle"], tuple(answer["findings"]), _scores(answer, plates)

    def explain(self, plates: np.ndarray) -> tuple[str, tuple[str, ...], np.ndarray, np.ndarray]:
        """Return the result of `predict`, and heatmaps float32 [N, F, g, g] of the same run."""
        import numpy as np

        answer = self._ask("POST", "/predict?heatmaps=1", _npy(plates))
        maps = np.frombuffer(base64.b64decode(answer["heatmaps"]["float32"]), "<f4")
        return (
            answer["bundle"],
            tuple(answer["findings"]),
            _scores(answer, plates),
            maps.reshape(answer["heatmaps"]["shape"]),
        )

    def state(self) -> dict | None:
        """Return the answer of /readyz, ready or not; None if no server answers."""
        try:
            return json.loads(self._exchange("GET", "/readyz", timeout=CONNECT_S)[1])
        except (OSError, http.client.HTTPException, ValueError):
            return None

    def ready(self) -> dict | None:
        """Return {"bundle", "provider", "since", ...} if a model is in service, else None."""
        state = self.state()
        return state if state is not None and state.get("ready") else None

    def prepare(self, bundle: str) -> dict:
        """Load, warm and probe a bundle beside the one in service; ServerRefused (409) holds the reason."""
        return self._ask("POST", "/prepare", json.dumps({"bundle": bundle}).encode(), LOAD_S)

    def reload(self) -> dict:
        """Make the server follow the pointer now: {"bundle", "previous", "swap_seconds", ...}; ServerRefused (409)."""
        return self._ask("POST", "/reload", timeout=LOAD_S)

    def _ask(self, method: str, path: str, body: bytes | None = None, timeout: float | None = None) -> dict:
        try:
            status, content = self._exchange(method, path, body, timeout or self.timeout)
        except (OSError, http.client.HTTPException) as error:
            raise ServerDown(f"no answer from {self.url}{path}: {error or type(error).__name__}") from None
        try:
            answer = json.loads(content)
        except ValueError:
            raise ServerRefused(status, f"{path} answered {status} without JSON") from None
        if status == 503:
            raise ServerDown(answer.get("error", "not ready"))
        if status != 200:
            raise ServerRefused(status, answer.get("error", "no reason given"), answer.get("bundle"))
        return answer

    def _exchange(
        self, method: str, path: str, body: bytes | None = None, timeout: float = ANSWER_S
    ) -> tuple[int, bytes]:
        """Return status and body of one request; raises OSError or HTTPException. `timeout` (s) is that of each read."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
            connection.sock.settimeout(timeout)
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def close(self) -> None:
        """Nothing is held open between requests."""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _npy(plates: np.ndarray) -> bytes:
    import numpy as np

    body = io.BytesIO()
    np.lib.format.write_array(body, np.ascontiguousarray(plates), allow_pickle=False)
    return body.getvalue()


def _scores(answer: dict, plates: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.array(answer["probabilities"], float).reshape(len(plates), -1)
