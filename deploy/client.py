"""Client of the model server on loopback HTTP; an answer names the bundle that computed it."""

import base64
import io

import httpx
import numpy as np

from deploy.errors import ServerDown, ServerRefused

CONNECT_S, ANSWER_S, LOAD_S = 2.0, 60.0, 300.0  # a large bundle on a busy GPU can load for minutes


class Client:
    """A server by its URL (`http://127.0.0.1:8123`); safe in several threads; close it or use `with`.

    Every request raises ServerDown or ServerRefused, except `state` and `ready`.
    """

    def __init__(self, url: str, timeout: float = ANSWER_S):
        # trust_env off: a proxy of the environment must never receive a plate
        # plain HTTP on loopback: skip the TLS context, which takes 0.1 s and more to make
        limit = httpx.Timeout(timeout, connect=CONNECT_S)
        self._http = httpx.Client(base_url=url, timeout=limit, trust_env=False, verify=False)

    def predict(self, plates: np.ndarray) -> tuple[str, tuple[str, ...], np.ndarray]:
        """Return (bundle, findings, probabilities float64 [N, F]) of plates uint8 [N, 512, 512]."""
        answer = self._ask("POST", "/predict", content=_npy(plates))
        return answer["bundle"], tuple(answer["findings"]), _scores(answer, plates)

    def explain(self, plates: np.ndarray) -> tuple[str, tuple[str, ...], np.ndarray, np.ndarray]:
        """Return the result of `predict`, and heatmaps float32 [N, F, g, g] of the same run."""
        answer = self._ask("POST", "/predict?heatmaps=1", content=_npy(plates))
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
            return self._http.get("/readyz", timeout=CONNECT_S).json()
        except (httpx.TransportError, ValueError):
            return None

    def ready(self) -> dict | None:
        """Return {"bundle", "provider", "since", ...} if a model is in service, else None."""
        state = self.state()
        return state if state is not None and state.get("ready") else None

    def prepare(self, bundle: str) -> dict:
        """Load, warm and probe a bundle beside the one in service; ServerRefused (409) holds the reason."""
        return self._ask("POST", "/prepare", json={"bundle": bundle}, timeout=LOAD_S)

    def reload(self) -> dict:
        """Make the server follow the pointer now: {"bundle", "previous", "swap_seconds", ...}; ServerRefused (409)."""
        return self._ask("POST", "/reload", timeout=LOAD_S)

    def _ask(self, method: str, path: str, **arguments) -> dict:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise ServerDown(f"no answer from {self._http.base_url}{path}: {error or type(error).__name__}") from None
        try:
            answer = response.json()
        except ValueError:
            raise ServerRefused(response.status_code, f"{path} answered {response.status_code} without JSON") from None
        if response.status_code == 503:
            raise ServerDown(answer.get("error", "not ready"))
        if response.status_code != 200:
            raise ServerRefused(response.status_code, answer.get("error", "no reason given"), answer.get("bundle"))
        return answer

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _npy(plates: np.ndarray) -> bytes:
    body = io.BytesIO()
    np.lib.format.write_array(body, np.ascontiguousarray(plates), allow_pickle=False)
    return body.getvalue()


def _scores(answer: dict, plates: np.ndarray) -> np.ndarray:
    return np.array(answer["probabilities"], float).reshape(len(plates), -1)
