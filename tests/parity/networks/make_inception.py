"""Reference features of Inception-v3 (2015-12-05), written with torch's functions, in float64.

    python tests/parity/networks/make_inception.py

writes inception.npz: names and shapes of the weights (their values come from seeded.py), and the features
of one seeded image.
Needs torch (2.13.0+cpu was used).
"""

import json
import pathlib

import numpy as np
import seeded
import torch
import torch.nn.functional as F

HERE = pathlib.Path(__file__).parent
SHAPES: dict = {}
WEIGHTS: dict = {}


def weight(name, *shape):
    SHAPES[name] = shape
    if name not in WEIGHTS:
        WEIGHTS[name] = torch.from_numpy(seeded.tensor(name, shape)).double()
    return WEIGHTS[name]


def conv(name, x, out, size, stride=1, pad=(0, 0)):
    raw = F.conv2d(x, weight(f"{name}.conv.weight", out, x.shape[1], *size), None, stride, pad)
    scale, shift, mean, var = (
        weight(f"{name}.bn.{leaf}", out)
        for leaf in ("weight", "bias", "running_mean", "running_var")
    )
    return raw, F.relu(F.batch_norm(raw, mean, var, scale, shift, False, 0.0, 1e-3))


def layer(name, x, out, size=(1, 1), stride=1, pad=(0, 0)):
    return conv(name, x, out, size, stride, pad)[1]


def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def mixed_a(name, x, pool):
    b1 = layer(f"{name}.branch1x1", x, 64)
    b5 = layer(f"{name}.branch5x5_1", x, 48)
    b5 = layer(f"{name}.branch5x5_2", b5, 64, (5, 5), 1, (2, 2))
    b3 = layer(f"{name}.branch3x3dbl_1", x, 64)
    b3 = layer(f"{name}.branch3x3dbl_2", b3, 96, (3, 3), 1, (1, 1))
    b3 = layer(f"{name}.branch3x3dbl_3", b3, 96, (3, 3), 1, (1, 1))
    return torch.cat([b1, b5, b3, layer(f"{name}.branch_pool", average(x), pool)], 1)


def mixed_b(name, x):
    b3 = layer(f"{name}.branch3x3", x, 384, (3, 3), 2)
    bd = layer(f"{name}.branch3x3dbl_1", x, 64)
    bd = layer(f"{name}.branch3x3dbl_2", bd, 96, (3, 3), 1, (1, 1))
    bd = layer(f"{name}.branch3x3dbl_3", bd, 96, (3, 3), 2)
    return torch.cat([b3, bd, F.max_pool2d(x, 3, 2)], 1)


def mixed_c(name, x, c):
    raw, b1 = conv(f"{name}.branch1x1", x, 192, (1, 1))
    b7 = layer(f"{name}.branch7x7_1", x, c)
    b7 = layer(f"{name}.branch7x7_2", b7, c, (1, 7), 1, (0, 3))
    b7 = layer(f"{name}.branch7x7_3", b7, 192, (7, 1), 1, (3, 0))
    bd = layer(f"{name}.branch7x7dbl_1", x, c)
    bd = layer(f"{name}.branch7x7dbl_2", bd, c, (7, 1), 1, (3, 0))
    bd = layer(f"{name}.branch7x7dbl_3", bd, c, (1, 7), 1, (0, 3))
    bd = layer(f"{name}.branch7x7dbl_4", bd, c, (7, 1), 1, (3, 0))
    bd = layer(f"{name}.branch7x7dbl_5", bd, 192, (1, 7), 1, (0, 3))
    return torch.cat([b1, b7, bd, layer(f"{name}.branch_pool", average(x), 192)], 1), raw


def mixed_d(name, x):
    b3 = layer(f"{name}.branch3x3_2", layer(f"{name}.branch3x3_1", x, 192), 320, (3, 3), 2)
    b7 = layer(f"{name}.branch7x7x3_1", x, 192)
    b7 = layer(f"{name}.branch7x7x3_2", b7, 192, (1, 7), 1, (0, 3))
    b7 = layer(f"{name}.branch7x7x3_3", b7, 192, (7, 1), 1, (3, 0))
    b7 = layer(f"{name}.branch7x7x3_4", b7, 192, (3, 3), 2)
    return torch.cat([b3, b7, F.max_pool2d(x, 3, 2)], 1)


def mixed_e(name, x, pooled):
    b1 = layer(f"{name}.branch1x1", x, 320)
    b3 = layer(f"{name}.branch3x3_1", x, 384)
    b3a = layer(f"{name}.branch3x3_2a", b3, 384, (1, 3), 1, (0, 1))
    b3b = layer(f"{name}.branch3x3_2b", b3, 384, (3, 1), 1, (1, 0))
    bd = layer(f"{name}.branch3x3dbl_1", x, 448)
    bd = layer(f"{name}.branch3x3dbl_2", bd, 384, (3, 3), 1, (1, 1))
    bda = layer(f"{name}.branch3x3dbl_3a", bd, 384, (1, 3), 1, (0, 1))
    bdb = layer(f"{name}.branch3x3dbl_3b", bd, 384, (3, 1), 1, (1, 0))
    pool = layer(f"{name}.branch_pool", pooled, 192)
    return torch.cat([b1, b3a, b3b, bda, bdb, pool], 1)


def inception(x):
    x = layer("Conv2d_1a_3x3", x, 32, (3, 3), 2)
    x = layer("Conv2d_2a_3x3", x, 32, (3, 3))
    x = layer("Conv2d_2b_3x3", x, 64, (3, 3), 1, (1, 1))
    x = F.max_pool2d(x, 3, 2)
    x = layer("Conv2d_3b_1x1", x, 80)
    x = layer("Conv2d_4a_3x3", x, 192, (3, 3))
    x = F.max_pool2d(x, 3, 2)
    x = mixed_a("Mixed_5b", x, 32)
    x = mixed_a("Mixed_5c", x, 64)
    x = mixed_a("Mixed_5d", x, 64)
    x = mixed_b("Mixed_6a", x)
    x, _ = mixed_c("Mixed_6b", x, 128)
    x, _ = mixed_c("Mixed_6c", x, 160)
    x, tap = mixed_c("Mixed_6d", x, 160)
    x, _ = mixed_c("Mixed_6e", x, 192)
    x = mixed_d("Mixed_7a", x)
    x = mixed_e("Mixed_7b", x, average(x))
    x = mixed_e("Mixed_7c", x, F.max_pool2d(x, 3, 1, 1))
    pool = x.mean((2, 3))
    kernel, bias = weight("fc.weight", 1008, 2048), weight("fc.bias", 1008)
    unbiased = pool @ kernel.T
    spatial = tap[:, :7].permute(0, 2, 3, 1).reshape(len(x), -1)
    return {
        "pool": pool,
        "spatial": spatial,
        "logits": unbiased + bias,
        "logits_unbiased": unbiased,
    }


if __name__ == "__main__":
    image = 0.5 * seeded.normal("image", (1, 299, 299, 3))
    x = torch.from_numpy(image.astype(np.float32)).double().permute(0, 3, 1, 2)
    with torch.no_grad():
        outputs = {name: value.float().numpy() for name, value in inception(x).items()}
    assert len(SHAPES) == 472, len(SHAPES)
    np.savez_compressed(HERE / "inception.npz", manifest=json.dumps(SHAPES), **outputs)
