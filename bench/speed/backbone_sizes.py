"""Size of the recommended backbones, and processor time and memory of one image at 224 px on the CPU, random weights.

Each network runs in a process of its own with one thread. It does not measure what a network learns.

    python bench/speed/backbone_sizes.py [--out bench/results/backbone_sizes.json]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.common import machine, results

EVA = {"eva": True, "img_size": 224, "patch_size": 16, "depth": 12, "ref_feat_shape": [14, 14]}
PLANS = {  # name: plan, side of the images in pixels
    "EVA-X-Ti": ({**EVA, "embed_dim": 192, "num_heads": 3, "mlp_ratio": 512.5 / 192}, 224),
    "EVA-X-S": ({**EVA, "embed_dim": 384, "num_heads": 6, "mlp_ratio": 1024.5 / 384}, 224),
    "DINOv2-S": ({"timm": "vit_small_patch14_dinov2"}, 224),
    "RAD-DINO": ({"timm": "vit_base_patch14_dinov2"}, 224),  # the same network as DINOv2-B
    "torchxrayvision DenseNet-121": ({"timm": "densenet121"}, 224),
}
BATCH, REPEATS = 4, 1  # images of a training step; runs after a first one


def measure(name: str) -> dict:
    """Return parameters, megabytes of the float32 weights, CPU seconds an image and megabytes of memory."""
    import torch

    from learner.networks.backbone import build

    torch.set_num_threads(1)
    plan, side = PLANS[name]
    net = build(plan, "timm")
    count = sum(parameter.numel() for parameter in net.parameters())
    images = torch.rand(BATCH, 3, side, side)

    def forward() -> None:
        with torch.no_grad():
            net(images)

    def step() -> None:
        net(images).square().sum().backward()
        net.zero_grad()

    seconds = {}
    for key, run in (("forward", forward), ("step", step)):
        run()
        start = time.process_time()
        for _ in range(REPEATS):
            run()
        seconds[key] = (time.process_time() - start) / (REPEATS * BATCH)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "name": name, "parameters": count, "file_mb": count * 4 / 1e6, "side": side, "batch": BATCH,
        "forward_cpu_s": seconds["forward"], "step_cpu_s": seconds["step"], "step_memory_mb": memory,
    }  # fmt: skip


def main() -> None:
    parser = results.parser(__doc__, "backbone_sizes.json")
    parser.add_argument("--name", help="measure one network in this process and print its row")
    options = parser.parse_args()
    if options.name:
        print(json.dumps(measure(options.name)))
        return
    rows, before = [], machine.facts("torch", "timm")
    for name in PLANS:
        done = subprocess.run([sys.executable, __file__, "--name", name], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        row = rows[-1]
        print(
            f"{name:30} {row['parameters'] / 1e6:5.1f} M  {row['file_mb']:4.0f} MB  forward {row['forward_cpu_s']:.2f} s  "
            f"step {row['step_cpu_s']:.2f} s  {row['step_memory_mb']:5.0f} MB"
        )
    results.write(options.out, {"machine": before, "rows": rows})


if __name__ == "__main__":
    main()
