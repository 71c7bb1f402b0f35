"""The learner's functions against inputs and outputs of the published code, in float64 unless a test says otherwise.

Tolerances: float64 1e-9 / 1e-10, whole epochs 1e-9, float32 2e-5.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from learner.engine.optim import (
    Schedule,
    alpha_ramp,
    clip_each,
    cosine_schedule,
    ema_update,
    make_optimiser,
    param_groups,
)
from learner.engine.step import Batch, State, run_steps
from learner.networks.backbone import Backbone
from learner.networks.heads import ClassHead, DinoHead, Network
from learner.objectives.class_losses import label_loss, self_training_loss
from learner.objectives.dino import DinoLoss
from learner.objectives.distl_steps import distl_step
from learner.round.recipe import Recipe
from tests.support.learner.golden_vectors import close, golden

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down


def weights(g, prefix):
    """Return the parameters with a prefix; in this code a backbone is one level deeper (`backbone.vit`)."""
    mine = {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix)}
    return {k.replace("backbone.", "backbone.vit."): v for k, v in mine.items()}


def tiny_vit():
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3, num_classes=0, dynamic_img_size=True
    )
    return Backbone(vit, "dino").double()


def tiny_network():
    return Network(tiny_vit(), DinoHead(12, 24, 16, 8), ClassHead(12, 1, 10)).double()


@pytest.mark.parametrize("name", ["distl_f64", "distl_f32", "fb_f64", "fb_f32"])
def test_dino_loss_centre_and_gradient_equal_the_published_code(name):
    g = golden(f"dino_loss_{name}")
    tolerance = {"rtol": 2e-5, "atol": 1e-6} if name.endswith("f32") else {}
    loss_of = DinoLoss(g["student"].shape[2], float(g["student_temp"]), 0.0, float(g["center_momentum"]))
    loss_of = loss_of.to(g["student"].dtype)
    for step in range(len(g["loss"])):
        close(loss_of.centre, g["center"][step], **tolerance)
        student = g["student"][step].clone().requires_grad_()
        loss = loss_of(student, g["teacher"][step], float(g["teacher_temp"][step]))
        loss.backward()
        loss_of.move(g["teacher"][step].mean(0, keepdim=True))
        close(loss.detach(), g["loss"][step], **tolerance)
        close(student.grad, g["grad_student"][step], **tolerance)
    close(loss_of.centre, g["center"][-1], **tolerance)


@pytest.mark.parametrize("name", ["dino_head", "dino_head_bn"])
def test_prototype_head_forward_and_gradients(name):
    g = golden(name)
    head = DinoHead(12, 20, 16, 8, batch_norm=name.endswith("bn")).double()
    # the running averages in the file are from after the forward pass; training mode does not read them
    head.load_state_dict(weights(g, "p."))
    x = g["x"].clone().requires_grad_()
    out = head(x)
    (out * g["w"]).sum().backward()
    close(out.detach(), g["out"])
    close(x.grad, g["grad_x"])
    close(head.last_layer.weight_v.grad, g["grad_weight_v"])
    assert head.last_layer.weight_g.requires_grad == bool(g["g_requires_grad"])


def test_class_head_forward():
    g = golden("cls_head")
    head = ClassHead(12, 3, 10).double()
    head.load_state_dict(weights(g, "p."))
    close(head(g["x"]).detach(), g["out"])


def test_closed_form_gradient_of_the_class_head_equals_autograd():
    g = golden("cls_head")
    head = ClassHead(12, 3, 10).double()
    head.load_state_dict(weights(g, "p."))
    for i in range(3):
        x = g["x"].clone().requires_grad_()
        head(x)[:, i].sum().backward()
        close(head.gradient(g["x"])[:, i].detach(), x.grad)


def test_schedules_equal_the_published_code():
    g = golden("schedules")
    close(cosine_schedule(5e-5 * 8 / 16, 1e-6, 5, 7, 1), g["lr_distl_1gpu"])
    close(cosine_schedule(5e-5 * 16 / 16, 1e-6, 5, 7, 1), g["lr_distl_2gpu"])
    close(cosine_schedule(0.01, 0.01, 5, 7), g["wd_distl"])
    close(cosine_schedule(1.25e-4, 1e-6, 12, 5, 10), g["lr_dino_default"])
    close(cosine_schedule(1.0, 0.1, 4, 5, 2, start=0.2), g["warm_start_nonzero"])
    close(cosine_schedule(0.04, 0.4, 5, 7), g["wd_dino"])
    close(cosine_schedule(0.9995, 1.0, 5, 7), g["mom_distl"])
    close(cosine_schedule(0.996, 1.0, 5, 7), g["mom_dino"])
    close(alpha_ramp(5), g["alpha_5"])
    close(alpha_ramp(7), g["alpha_7"])


@pytest.mark.parametrize("name", ["C1", "C14"])
def test_class_losses_gradients_and_their_mix(name):
    g = golden(f"distl_cls_loss_{name}")
    samples = int(g["B"])
    student = g["student_cls"].clone().requires_grad_()
    pseudo = self_training_loss(student[samples:], g["teacher_cls"][:samples])
    pseudo.backward()
    close(pseudo.detach(), g["ce_pseudo"])
    close(student.grad, g["grad_pseudo"])
    assert not student.grad[:samples].any()
    student = g["student_cls"].clone().requires_grad_()
    labelled = label_loss(student[samples:], g["y"])
    labelled.backward()
    close(labelled.detach(), g["ce_label"])
    close(student.grad, g["grad_label"])
    mixed = 0.5 * g["mix_example_dino"] + 0.5 * torch.from_numpy(alpha_ramp(5)) * g["ce_pseudo"]
    close(mixed, g["mix_total_epoch"])


def test_moving_average_recursion():
    g = golden("ema")
    teacher, student = torch.nn.Linear(8, 1, bias=False).double(), torch.nn.Linear(8, 1, bias=False).double()
    with torch.no_grad():
        teacher.weight.copy_(g["teacher"][0][None])
    for i in range(len(g["momentum"])):
        with torch.no_grad():
            student.weight.copy_(g["student"][i][None])
        ema_update(teacher, student, float(g["momentum"][i]))
        close(teacher.weight[0].detach(), g["teacher"][i + 1])
    close(cosine_schedule(0.9995, 1.0, 2, 4), g["momentum"])


def test_clipping_is_per_tensor_and_vectors_are_not_decayed():
    g = golden("clip_and_groups")
    names = [*map(str, g["decay_names"]), *map(str, g["nodecay_names"])]
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(int(n)).double()) for n in g["sizes"]])
    for parameter, part in zip(model, g["before"].split(g["sizes"].tolist()), strict=True):
        parameter.grad = part.clone()
    norms = clip_each(model, float(g["clip"]))
    close(torch.cat([p.grad for p in model]), g["after"])
    close(torch.stack(norms), g["norms"])
    assert len(names) == len(g["sizes"])
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    decayed, free = param_groups(layer)
    assert [p.ndim for p in decayed["params"]] == [2]
    assert len(free["params"]) == 3
    assert free["weight_decay"] == float(g["nodecay_wd"])


def test_vision_transformer_output_attention_and_positions_at_three_sizes():
    g = golden("vit")
    backbone = tiny_vit()
    backbone.vit.load_state_dict(weights(g, "p."))
    for side in (32, 40, 16):
        with torch.no_grad():
            close(backbone.positions(side // 8, side // 8), g[f"pos{side}"])
            close(backbone(g[f"x{side}"]), g[f"cls{side}"])
            close(backbone.attentions(g[f"x{side}"])[-1], g[f"attn{side}"])


def test_outputs_are_view_major_and_only_global_views_are_classified():
    g = golden("multicrop")
    network = tiny_network()
    network.load_state_dict(weights(g, "p."))
    with torch.no_grad():
        head, classes = network([g[k] for k in ("g0", "g1", "l0", "l1", "l2")])
        close(head, g["head_out"])
        close(classes, g["cls_out"])
        close(network.classify(g["g1"]), g["single_cls_g1"])


class Given:
    """A feed of tensors from a golden file."""

    def __init__(self, g, mark):
        self.groups = []
        while f"{mark}{len(self.groups)}.v0" in g:
            i = len(self.groups)
            labels = g[f"{mark}{i}.y"].double()[:, None] if mark == "l" else None
            self.groups.append(([g[f"{mark}{i}.v{v}"] for v in range(5)], labels))
        self.batches = len(self.groups)

    def batch(self, epoch, index):
        views, labels = self.groups[index]
        return Batch(len(views[0]), lambda part: [v[part] for v in views], labels)


def published_epochs(g, micro=0, alpha=True):
    """Run two epochs with `run_steps`; yield the state after each."""
    student, teacher = tiny_network(), tiny_network()
    student.load_state_dict(weights(g, "init."))
    teacher.load_state_dict(weights(g, "init."))
    teacher.requires_grad_(False)
    recipe = replace(Recipe(), lam=float(g["lam"]), correct_every=int(g["correct"]), correct_first=True)
    ramp = alpha_ramp(2) if alpha else np.ones(2)
    schedule = Schedule(g["lr"].numpy(), g["wd"].numpy(), g["momentum"].numpy(), ramp, steps_per_epoch=3)
    centres = torch.nn.ModuleDict({"dino": DinoLoss(24, 0.1, 0.04, 0.9)}).double()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = State(student, teacher, make_optimiser(student), schedule, recipe, scaler, centres, micro=micro)
    seen, ends = [], {}

    def after(losses):
        seen.append((losses["dino"], centres["dino"].centre.clone()))
        if state.burst is None and state.step % 3 == 0:
            ends[state.step // 3 - 1] = {
                "student": {k: v.clone() for k, v in student.state_dict().items()},
                "teacher": {k: v.clone() for k, v in teacher.state_dict().items()},
            }

    unlabelled, labelled = Given(g, "u"), Given(g, "l")
    run_steps(state, lambda state: distl_step(state, unlabelled, labelled), after)
    return ends, seen


@pytest.mark.parametrize("micro", [0, 1, 3])
@pytest.mark.parametrize("name", ["e2e_epoch_f64", "e2e_epoch_f64_noalpha_nocorrect"])
def test_two_epochs_equal_the_published_code_for_any_size_of_parts(name, micro):
    g = golden(name)
    ends, seen = published_epochs(g, micro, alpha="noalpha" not in name)
    close(torch.tensor([dino for dino, _ in seen], dtype=torch.float64), g["dino_loss_calls"], atol=1e-9)
    close(torch.stack([centre for _, centre in seen]), g["center_calls"], atol=1e-9)
    for epoch in (0, 1):
        for who in ("student", "teacher"):
            theirs = weights(g, f"ep{epoch}.{who}.")
            assert theirs.keys() == ends[epoch][who].keys()
            for key, value in theirs.items():
                close(ends[epoch][who][key], value, atol=1e-9)
