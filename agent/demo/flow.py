"""Images that keep coming while a model is swapped: C-STORE from a thread, and questions to /predict from another.

It counts what failed; that is all it knows.
"""

import io
import threading
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

from agent.demo import pacs


class Flow:
    """Sends `paths` to the node and asks the model server all the time, inside a `with` block."""

    def __init__(self, paths: list[Path], port: int, aet: str, url: str) -> None:
        self.paths, self.port, self.aet, self.url = paths, port, aet, url
        self.stop = threading.Event()
        self.statuses: Counter[int | None] = Counter()
        self.answers: Counter[str] = Counter()  # by bundle
        self.failed = 0
        self.threads = [threading.Thread(target=self._send), threading.Thread(target=self._ask)]

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

    def _ask(self) -> None:
        body = io.BytesIO()
        np.save(body, np.full((1, 512, 512), 90, np.uint8))
        with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as client:
            while not self.stop.is_set():
                try:
                    answer = client.post("/predict", content=body.getvalue())
                    self.answers[answer.raise_for_status().json()["bundle"]] += 1
                except httpx.HTTPError:
                    self.failed += 1

    def said(self) -> str:
        """What came of it, in a line."""
        images = f"{self.statuses[0]} of {sum(self.statuses.values())} images acknowledged"
        asked = f"{sum(self.answers.values())} answers from {' then '.join(self.answers) or 'no model'}"
        return f"meanwhile {images}; {asked}, {self.failed} failed requests"
