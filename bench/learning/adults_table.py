from pathlib import Path


def report(adults, scores: Path, results: Path) -> None:
    pass
