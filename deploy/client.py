"""Ask the inference server: the agent's side of the loopback HTTP.

Refuses to know bundles' content and the pointer; an answer names the bundle that gave it.
"""

import base64
import io

import httpx
import numpy as np

CONNECT_S, ANSWER_S, LOAD_S = 2.0, 60.0, 300.0  # loading a large bundle on a busy GPU takes minutes at worst


class ServerDown(Exception):
    """Nobody to ask now: not started, stopped, too slow, busy, or no model in service. Ask again later."""


class ServerRefused(Exception):
    """The server answered, and said no; `status` is the HTTP status, `bundle` the one in service."""

    def __init__(self, status: int, error: str, bundle: str | None = None):
        super().__init__(error)
        self.status, self.error, self.bundle = status, error, bundle


class Client:
    """One server by its URL (`http://127.0.0.1:8123`); safe in several threads; close it or use `with`."""

    def __init__(self, url: str, timeout: float = ANSWER_S):
        # trust_env off: a proxy of the hospital's environment must never see a plate
        # plain HTTP on the loopback: a TLS context, 0.1 s and more to make, would never be used
        limit = httpx.Timeout(timeout, connect=CONNECT_S)
        self._http = httpx.Client(base_url=url, timeout=limit, trust_env=False, verify=False)

    def predict(self, plates: np.ndarray) -> tuple[str, tuple[str, ...], np.ndarray]:
        """(bundle, findings, probabilities float64 [N, F]) of plates uint8 [N, 512, 512]; ServerRefused, ServerDown."""
        answer = self._ask("POST", "/predict", content=_npy(plates))
        return answer["bundle"], tuple(answer["findings"]), _scores(answer, plates)

    def explain(self, plates: np.ndarray) -> tuple[str, tuple[str, ...], np.ndarray, np.ndarray]:
        """What `predict` says, and the heatmaps float32 [N, F, g, g] of the same run."""
        answer = self._ask("POST", "/predict?heatmaps=1", content=_npy(plates))
        maps = np.frombuffer(base64.b64decode(answer["heatmaps"]["float32"]), "<f4")
        return (
            answer["bundle"],
            tuple(answer["findings"]),
            _scores(answer, plates),
            maps.reshape(answer["heatmaps"]["shape"]),
        )

    def state(self) -> dict | None:
        """What /readyz says, ready or not; None where nothing answers."""
        try:
            return self._http.get("/readyz", timeout=CONNECT_S).json()
        except (httpx.TransportError, ValueError):
            return None

    def ready(self) -> dict | None:
        """{"bundle", "provider", "since", ...} once a model is in service, else None."""
        state = self.state()
        return state if state is not None and state.get("ready") else None

    def prepare(self, bundle: str) -> dict:
        """Load, warm and probe a bundle beside the one in service; ServerRefused (409) with the reason."""
        return self._ask("POST", "/prepare", json={"bundle": bundle}, timeout=LOAD_S)

    def reload(self) -> dict:
        """Make the server follow the pointer now: {"bundle", "previous", "swap_seconds", ...}; ServerRefused (409)."""
        return self._ask("POST", "/reload", timeout=LOAD_S)

    def _ask(self, method: str, path: str, **arguments) -> dict:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TransportError as away:
            raise ServerDown(f"no answer from {self._http.base_url}{path}: {away or type(away).__name__}") from None
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
