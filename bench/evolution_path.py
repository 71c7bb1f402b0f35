"""What lies between the model before a round and the trained teacher: AUC of `evolve` at T=1 along the straight way.

    python bench/evolution_path.py --data DIR --backbone FILE --work DIR [--share 0.01] [--draws 0 1 2 3 4 5]

Experiment A of bench/evolution.py, its films, bank and sizes. Each share `a` of the teacher's weights gets its class head
refitted on its own graph, as a candidate of the recipe does. One line a point in bench/results/evolution_path.jsonl.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from evolution import EVOLVE, RESULTS, SIZES, open_bank_of
from evolution_arms import Banks, CellRun, Site, learn
from evolution_films import NEAR, draw, read_pool

from learner.auc import auc
from learner.average import wise
from learner.heads import Network
from learner.recipe import Recipe
from learner.recipes import evolve
from learner.step import State

WAY = (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    """Measure the draws asked for, then print the mean of all that were measured."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--data", type=Path, required=True)
    asked.add_argument("--backbone", type=Path, required=True)
    asked.add_argument("--work", type=Path, required=True)
    asked.add_argument("--share", type=float, default=0.01)
    asked.add_argument("--draws", type=int, nargs="*", default=list(range(6)))
    given = asked.parse_args()
    torch.set_num_threads(1)
    pool = read_pool(given.data, given.work, NEAR)
    recipe = Recipe().override({**SIZES, "backbone": str(given.backbone)})
    site = Site(pool, Banks([open_bank_of(pool.films, recipe, given.work / "bank")]), recipe, given.work / "cells")
    target = RESULTS / "evolution_path.jsonl"
    for seed in given.draws:
        evolve.choose = lambda run, final, champion, seed=seed: walk(run, final, champion, given.share, seed, target)
        learn(site, draw(pool, "A", given.share, seed), "evolve", EVOLVE, f"path-{seed}", lambda *_: None, rounds=1)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    print("   a  draws  validation  internal  external")
    for a in WAY:
        of = [line for line in lines if line["a"] == a]
        means = "  ".join(f"{np.mean([line[k] for line in of]):9.4f}" for k in ("validation", "internal", "external"))
        print(f"{a:4g}  {len(of):5}  {means}")


def walk(run: CellRun, final: State, champion: Network, share: float, seed: int, target: Path) -> str:
    """Stands in for the recipe's choice: every point of the way is scored, and the last one is kept."""
    before, teacher = champion.state_dict(), final.teacher.state_dict()
    places = run.tests | {"validation": np.array([film.image for film in run.round.of("validation")])}
    truth = run.site.pool.truth
    for a in WAY:
        final.student.load_state_dict(wise(before, teacher, a))
        evolve.refit(run, final.student)
        said = run.scores(final.student)
        found = {k: round(auc(said[k].astype(float), truth[at].astype(float)), 4) for k, at in places.items()}
        with target.open("a") as file:
            file.write(json.dumps({"share": share, "draw": seed, "a": a, **found}) + "\n")
    return "teacher"


if __name__ == "__main__":
    main()
