"""Small networks of each family of backbones: the family's own output, and its weights under the family's own names.

Hugging Face's networks are transformers' own. The DenseNet-121 is torchvision's with one input channel, which is what
torchxrayvision builds (that library needs pandas and scikit-image). The others are timm's networks under the names that the
families' own code gives the tensors, because that code is in no package of the index.
"""

import re

import torch
import torch.nn.functional as F
import torchvision
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

SIDE = 64  # pixels
SIZES = {"img_size": SIDE, "patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 2}


def spread(net):
    """Return the network in eval mode with all parameters drawn, so that none is 0 or 1, which would hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (0.5 if parameter.ndim == 1 else 0.0))
    return net.eval()


def images(channels=3):
    return torch.rand(2, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def hugging_face(folder, registers=False):
    """Write a small Dinov2 with transformers' `save_pretrained`; return the file and the network's function of tokens."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 16}
    if registers:
        net = spread(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=3)))
    else:
        net = spread(Dinov2Model(Dinov2Config(**sizes)))
    net.save_pretrained(folder)
    return folder / "model.safetensors", lambda x: net(x).last_hidden_state


def timm_vit():
    net = spread(VisionTransformer(**SIZES, num_classes=5))
    return net.state_dict(), net.forward_features


def dino():
    """Return a teacher's backbone with its DINO head, as DINO's full checkpoint names them."""
    net = spread(VisionTransformer(**SIZES, num_classes=0))
    weights = {f"module.backbone.{key}": value for key, value in net.state_dict().items()}
    head = {
        "mlp.0.weight": (16, 128),
        "mlp.0.bias": (16,),
        "last_layer.weight_g": (8, 1),
        "last_layer.weight_v": (8, 16),
    }
    return weights | {f"module.head.{key}": torch.rand(shape) for key, shape in head.items()}, net.forward_features


def dinov2():
    net = spread(VisionTransformer(**SIZES, num_classes=0, init_values=1.0))
    return net.state_dict() | {"mask_token": torch.rand(1, 128)}, net.forward_features


def dinov2_with_registers():
    """Return weights in which the class token's position is in the table of positions, as DINOv2 keeps it."""
    net = spread(VisionTransformer(**SIZES, num_classes=0, init_values=1.0, reg_tokens=3, no_embed_class=True))
    weights, position = net.state_dict(), torch.randn(1, 1, 128)
    weights["register_tokens"] = weights.pop("reg_token")
    weights["pos_embed"] = torch.cat([position, weights["pos_embed"]], 1)
    weights["cls_token"] = weights["cls_token"] - position
    return weights | {"mask_token": torch.rand(1, 128)}, net.forward_features


def mae():
    net = spread(VisionTransformer(**SIZES, num_classes=0))
    shapes = {
        "mask_token": (1, 1, 64), "decoder_embed.weight": (64, 128), "decoder_pos_embed": (1, 17, 64),
        "decoder_blocks.0.attn.qkv.weight": (192, 64), "decoder_norm.weight": (64,), "decoder_pred.weight": (768, 64),
    }  # fmt: skip
    return net.state_dict() | {key: torch.rand(shape) for key, shape in shapes.items()}, net.forward_features


def eva_x(base=False, split=False):
    """Return EVA-X's network, which is timm's Eva with these arguments, and its weights under EVA-02's names.

    `base`: separate query, key and value, and a norm in the MLP, as in EVA-X-B; `split`: gate and value of the MLP apart.
    """
    own = {"qkv_fused": False, "scale_mlp": True} if base else {}
    net = spread(
        Eva(
            **SIZES, mlp_ratio=4 * 2 / 3, swiglu_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(4, 4), num_classes=0,
            use_post_transformer_norm=True, use_fc_norm=False, **own,
        )
    )  # fmt: skip
    names = {"fc1_g": "w1", "fc1_x": "w2", "fc2": "w3", "norm": "ffn_ln", "fc1": "w12"}
    weights = {}
    for key, value in net.state_dict().items():
        key = re.sub(r"\.mlp\.(\w+)\.", lambda match: f".mlp.{names[match[1]]}.", key)
        key = re.sub(r"\.(q|v)_proj\.bias", r".\1_bias", key)
        if split and ".mlp.w12." in key:
            weights |= dict(zip((key.replace("w12", "w1"), key.replace("w12", "w2")), value.chunk(2), strict=True))
        else:
            weights[key] = value
    aside = {"mask_token": torch.rand(1, 1, 128), "lm_head.weight": torch.rand(8, 128), "lm_head.bias": torch.rand(8)}
    return weights | aside | {"rope.freqs_cos": torch.rand(16, 64)}, net.forward_features


def xray_densenet():
    """Return a DenseNet-121 of one input channel with torchxrayvision's preprocessing: grey levels to [-1024, 1024]."""
    torch.manual_seed(0)
    net = torchvision.models.densenet121(weights=None)
    net.features.conv0 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    net.classifier = torch.nn.Linear(1024, 18)
    with torch.no_grad():  # statistics of real images, so that no feature is 0 or huge
        net.train()((2 * images(1) - 1) * 1024)
    net.eval()

    def features(x):
        return F.relu(net.features((2 * x - 1) * 1024)).mean((2, 3))

    return net.state_dict() | {"op_threshs": torch.rand(18)}, features
