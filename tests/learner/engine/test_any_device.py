"""Whole rounds, a step and saliency maps on the device that CXRLOOP_TEST_DEVICE names: cpu by default, cuda in `make gpu`.

Uses no fixture of conftest.py, so that it runs where only torch, timm and onnxruntime are installed.
"""

import json
import os
import signal

import pytest
import torch

from learner.__main__ import main
from learner.data.augment import to_image
from learner.engine.step import Batch
from learner.errors import LearnerError
from learner.explain import saliency
from learner.networks.pooling import resize_matrix
from learner.objectives.distl_steps import unlabelled_step
from learner.round.folder import PAUSED
from learner.training.export import probe_plates
from tests.support.learner.processes import start, wait_for
from tests.support.learner.recipe_rounds import CLASS_LOSS_ONLY, CONVNET
from tests.support.learner.round_folders import card, make_round, result
from tests.support.learner.tiny_states import make_batch, make_state, parameters

DEVICE = os.environ.get("CXRLOOP_TEST_DEVICE", "cpu")
RECIPES = {
    "distl": {},
    "evolve": {"method": "evolve", "ibot": 0.5, "koleo": 0.1, "targets": "graph"},
    "pseudo-label": {"method": "pseudo-label", **CLASS_LOSS_ONLY, "arch": CONVNET},
    "kd": {"method": "kd", **CLASS_LOSS_ONLY, "kd_teacher": CONVNET},
    "pretrain": {"method": "pretrain", "targets": "none"},
}


@pytest.mark.parametrize("name", list(RECIPES)[: 1 if DEVICE == "cpu" else None])  # the others have tests on the CPU
def test_a_round_of_each_recipe_trains_and_exports(tmp_path, name):
    folder = make_round(tmp_path / "r", device=DEVICE, epochs=1, t0_epochs=1, **RECIPES[name])
    assert main([str(folder)]) == 0
    assert result(folder)["state"] == "trained"
    if name != "pretrain":
        assert max(card(folder)["parity"][size] for size in ("1", "8")) <= 1e-3


def test_a_round_that_is_paused_resumes_and_takes_every_step_once(tmp_path):
    folder = make_round(tmp_path / "r", device=DEVICE, epochs=10, checkpoint_seconds=0)
    process = start(folder)
    wait_for(folder / "checkpoint" / "state.safetensors", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == PAUSED
    assert main([str(folder)]) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    bursts = len([step for step in range(1, 10 * 3) if step % 2 == 0])  # after each, one epoch of two labelled batches
    assert sum(row["phase"] == "distil" for row in rows) == 10 * 3 + 2 * bursts


def test_a_step_in_float64_is_that_of_the_cpu():
    batch, states, losses = make_batch(), {}, {}
    for device in ("cpu", DEVICE):
        state = states[device] = make_state()
        for network in (state.student, state.teacher, state.centres):
            network.to(device)
        views = [view.to(device) for view in batch.views(slice(0, batch.size))]
        moved = Batch(batch.size, lambda part, views=views: [view[part] for view in views], None)
        losses[device] = unlabelled_step(state, moved)
    assert losses[DEVICE] == pytest.approx(losses["cpu"], rel=1e-9)
    assert parameters(states[DEVICE].student).device.type == DEVICE
    apart = parameters(states[DEVICE].student).cpu() - parameters(states["cpu"].student)
    assert apart.abs().max() < 1e-7


@pytest.mark.parametrize("method", saliency.METHODS)
def test_a_saliency_map_is_that_of_the_cpu(method):
    torch.manual_seed(0)
    state = make_state(image_size=16, local_size=8)
    network, recipe = state.student.float().eval(), state.recipe
    images = to_image(torch.from_numpy(probe_plates()[:2]), resize_matrix(512, 16))
    maps = {}
    for device in ("cpu", DEVICE):
        try:
            made, _ = saliency.explain(network.to(device), recipe, images.to(device), 0, method)
            maps[device] = made.cpu()
        except LearnerError as error:  # such as guided backpropagation, which a transformer does not have
            maps[device] = str(error)
    if isinstance(maps["cpu"], str):
        assert maps[DEVICE] == maps["cpu"]
    else:
        assert torch.allclose(maps[DEVICE], maps["cpu"], atol=1e-4 * float(maps["cpu"].abs().max()), rtol=1e-2)
