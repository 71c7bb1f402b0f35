"""Traffic while a model is swapped: one thread sends images by C-STORE, another sends requests to /predict."""

import io
import threading
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

from agent.demo import pacs


class Flow:
    """Sends `paths` to the node, and requests to the model server until all are sent, inside a `with` block."""

    def __init__(self, paths: list[Path], port: int, aet: str, url: str) -> None:
        self.paths, self.port, self.aet, self.url = paths, port, aet, url
        self.stop = threading.Event()
        self.statuses: Counter[int | None] = Counter()  # of C-STORE
        self.answers: Counter[str] = Counter()  # of /predict, by bundle
        self.failed = 0  # requests to /predict
        self.threads = [threading.Thread(target=self._send), threading.Thread(target=self._request)]

    def __enter__(self) -> "Flow":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.threads[0].join()
        self.stop.set()
        self.threads[1].join()

    def _send(self) -> None:
        for _, status in pacs.deliver(self.paths, self.port, self.aet):
            self.statuses[status] += 1

    def _request(self) -> None:
        body = io.BytesIO()
        np.save(body, np.full((1, 512, 512), 90, np.uint8))
        with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as client:
            while not self.stop.is_set():
                try:
                    answer = client.post("/predict", content=body.getvalue())
                    self.answers[answer.raise_for_status().json()["bundle"]] += 1
                except httpx.HTTPError:
                    self.failed += 1

    def summary(self) -> str:
        """Return the counts in one line."""
        images = f"{self.statuses[0]} of {sum(self.statuses.values())} images acknowledged"
        answers = f"{sum(self.answers.values())} answers from {' then '.join(self.answers) or 'no model'}"
        return f"meanwhile {images}; {answers}, {self.failed} failed requests"
