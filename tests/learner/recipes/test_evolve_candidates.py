"""The choice of weights in `evolve`: candidates, running mean, and keeping the champion."""

import pytest
import torch

from learner.__main__ import main
from learner.data.plates import label_table
from learner.engine.checkpoint import read_file
from learner.engine.progress import ProgressWriter
from learner.engine.weight_averaging import recompute_batch_norm
from learner.fits import logistic
from learner.recipes import evolve
from learner.round.manifest import load
from learner.training import head_fit
from learner.training.run import Run
from tests.support.learner.round_folders import make, result

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


def test_the_running_mean_covers_the_last_fifth_of_the_steps(tmp_path, monkeypatch):
    students, step = [], ProgressWriter.write_step

    def watched(progress, state, losses):
        if state.phase == "evolve":
            students.append({key: value.clone() for key, value in state.student.state_dict().items()})
        step(progress, state, losses)

    monkeypatch.setattr(ProgressWriter, "write_step", watched)
    folder = make(tmp_path / "r", average="all", epochs=4)
    assert main([str(folder)]) == 0
    assert len(students) == 12
    kept = read_file(folder / "checkpoint/evolve.safetensors")[0]
    for key, value in students[-1].items():
        torch.testing.assert_close(kept[f"extra.swa.{key}"], (students[-2][key] + value) / 2)
    assert not torch.equal(kept["extra.swa.head.last_layer.weight_v"], students[-1]["head.last_layer.weight_v"])
    assert not any(key.startswith("extra.") for key in read_file(folder / "final/state.safetensors")[0])


def test_the_running_mean_is_chosen_where_it_is_best_on_validation(tmp_path):
    run = Run(load(make(tmp_path / "r", samples={"validation": 24}, refit="none", average="all")))
    final = run.new_state("evolve", run.schedule(run.unlabelled_feed(), 1, 1e-3))
    champion = run.new_network()
    champion.load_state_dict(final.student.state_dict())
    answer = logistic.fit(
        run.embeddings(champion, run.manifest.of("validation")), label_table(run.manifest.of("validation")), 0.1
    )
    head_fit.set_head(final.student, answer)
    final.extra = {f"swa.{key}": value.clone() for key, value in final.student.state_dict().items()}
    for network in (champion, final.teacher, final.student):
        network.cls_head.load_state_dict({k: -v for k, v in final.student.cls_head.state_dict().items()})
    assert evolve.choose_candidate(run, final, champion) == "swa"
    torch.testing.assert_close(final.student.cls_head.mlp[-1].weight.double(), answer.weight)
    assert final.extra == {}
    run.progress.close()


def test_batch_norm_of_averaged_weights_is_computed_from_the_images(tmp_path):
    folder = make(tmp_path / "r", arch="test_resnet", average="all", refit="none", lam=0.0, prototypes=0, local_views=0)
    assert main([str(folder)]) == 0, result(folder)
    run = Run(load(folder))
    backbone = run.new_state("evolve", run.schedule(run.unlabelled_feed(), 1, 1e-3)).student.backbone
    norm = next(module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d))
    inputs = []
    norm.register_forward_hook(lambda _, arguments, __: inputs.append(arguments[0].detach()))
    recompute_batch_norm(backbone, evolve.unaugmented_batches(run))
    torch.testing.assert_close(norm.running_mean, inputs[0].mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, inputs[0].var((0, 2, 3)))
    assert (len(inputs), len(inputs[0])) == (1, 14)
    assert (norm.momentum, norm.training) == (0.1, True)
    run.progress.close()


@pytest.mark.parametrize(("factor", "chosen"), [(-1.0, "champion"), (0.5, "teacher")])
def test_the_champion_is_kept_only_where_the_round_made_it_worse(tmp_path, factor, chosen):
    run = Run(load(make(tmp_path / "r", samples={"validation": 24}, refit="none", average="ema")))
    samples = run.manifest.of("validation")
    final = run.new_state("evolve", run.schedule(run.unlabelled_feed(), 1, 1e-3))
    champion = final.student
    seen = run.embeddings(champion, samples)
    head_fit.set_head(champion, logistic.fit(seen, label_table(samples), 1e-3))
    kept = {key: value.clone() for key, value in champion.state_dict().items()}
    final.student = run.new_network()
    final.student.load_state_dict(kept)
    for layer in final.student.cls_head.parameters():
        layer.data *= factor  # -1: all logits negated; .5: same order of images
    final.teacher.load_state_dict(final.student.state_dict())
    assert evolve.choose_candidate(run, final, champion) == chosen
    for key, value in final.student.state_dict().items():
        assert torch.equal(value, kept[key] * (factor if chosen == "teacher" and key.startswith("cls_head") else 1)), (
            key
        )
    run.progress.close()
