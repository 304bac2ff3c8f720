"""Inception-v3 with the weights of 2015-12-05, whose features FID, sFID and the Inception Score use.

It differs from the published network (Szegedy et al. 2016, arXiv 1512.00567) as its TensorFlow graph
does: batch normalization with eps 1e-3, average pools that do not count the padding, a maximum in place
of the average in the last block, 1008 classes. Module names are those of the weights in PyTorch
(`pt_inception-2015-12-05-6726825d.pth`).
"""

import functools
import hashlib
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from qdiff_jax.eval.networks.conv_bn import ConvBN
from qdiff_jax.eval.networks.state_dict import to_parameters

SIZE = 299
PUBLISHED = "6726825d"
# Channels of the map that sFID compares (Nash et al. 2021, arXiv 2103.03841): 7 x 17 x 17 = 2023.
_SPATIAL_CHANNELS = 7


def _conv(name, x, features, kernel=(1, 1), stride=1, padding="SAME"):
    """A convolution, normalized, with ReLU. Called inside a compact method, like a submodule."""
    _, normalized = ConvBN(features, kernel, stride, padding, name=name)(x)
    return nn.relu(normalized)


def _chain(prefix, x, *layers):
    """Convolutions `prefix_1`, `prefix_2`, ...; a layer is (features, kernel)."""
    for i, (features, kernel) in enumerate(layers, 1):
        x = _conv(f"{prefix}_{i}", x, features, kernel)
    return x


def _average(x):
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _halve(x):
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def _concatenate(*branches):
    return jnp.concatenate(branches, axis=-1)


class MixedA(nn.Module):
    """Mixed_5b to 5d, at 35 x 35."""

    pool_features: int

    @nn.compact
    def __call__(self, x):
        return _concatenate(
            _conv("branch1x1", x, 64),
            _chain("branch5x5", x, (48, (1, 1)), (64, (5, 5))),
            _chain("branch3x3dbl", x, (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
            _conv("branch_pool", _average(x), self.pool_features),
        )


class MixedB(nn.Module):
    """Mixed_6a, to 17 x 17."""

    @nn.compact
    def __call__(self, x):
        double = _chain("branch3x3dbl", x, (64, (1, 1)), (96, (3, 3)))
        return _concatenate(
            _conv("branch3x3", x, 384, (3, 3), 2, "VALID"),
            _conv("branch3x3dbl_3", double, 96, (3, 3), 2, "VALID"),
            _halve(x),
        )


class MixedC(nn.Module):
    """Mixed_6b to 6e, at 17 x 17: (output, branch1x1 before its normalization, for sFID)."""

    width: int

    @nn.compact
    def __call__(self, x):
        c, row, column = self.width, (1, 7), (7, 1)
        raw, single = ConvBN(192, (1, 1), name="branch1x1")(x)
        double = ((c, (1, 1)), (c, column), (c, row), (c, column), (192, row))
        output = _concatenate(
            nn.relu(single),
            _chain("branch7x7", x, (c, (1, 1)), (c, row), (192, column)),
            _chain("branch7x7dbl", x, *double),
            _conv("branch_pool", _average(x), 192),
        )
        return output, raw


class MixedD(nn.Module):
    """Mixed_7a, to 8 x 8."""

    @nn.compact
    def __call__(self, x):
        h = _chain("branch7x7x3", x, (192, (1, 1)), (192, (1, 7)), (192, (7, 1)))
        return _concatenate(
            _conv("branch3x3_2", _conv("branch3x3_1", x, 192), 320, (3, 3), 2, "VALID"),
            _conv("branch7x7x3_4", h, 192, (3, 3), 2, "VALID"),
            _halve(x),
        )


class MixedE(nn.Module):
    """Mixed_7b and 7c, at 8 x 8; 7c takes the maximum where 7b takes the average."""

    maximum: bool

    @nn.compact
    def __call__(self, x):
        def fork(prefix, h):
            return (_conv(f"{prefix}a", h, 384, (1, 3)), _conv(f"{prefix}b", h, 384, (3, 1)))

        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.maximum else _average(x)
        return _concatenate(
            _conv("branch1x1", x, 320),
            *fork("branch3x3_2", _conv("branch3x3_1", x, 384)),
            *fork("branch3x3dbl_3", _chain("branch3x3dbl", x, (448, (1, 1)), (384, (3, 3)))),
            _conv("branch_pool", pooled, 192),
        )


class Head(nn.Module):
    """pool [B, 2048] -> logits [B, 1008] with the bias and without."""

    @nn.compact
    def __call__(self, pool):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (pool.shape[-1], 1008))
        bias = self.param("bias", nn.initializers.zeros_init(), (1008,))
        unbiased = jnp.matmul(pool, kernel, precision=lax.Precision.HIGHEST)
        return unbiased + bias[None], unbiased


class Inception(nn.Module):
    """Images [B, 299, 299, 3] float32, as (value - 128) / 128 of the 8-bit scale, resized as the metric
    prescribes -> dict of float32 features:

    - "pool" [B, 2048]: mean of the last map;
    - "spatial" [B, 2023]: the first 7 channels of Mixed_6d.branch1x1 before normalization, 17 x 17 x 7
      flattened;
    - "logits" [B, 1008] and "logits_unbiased" [B, 1008], the same without the last layer's bias.

    Other sizes from 75 up are computed as well (only "spatial" then has another length).
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        x = _conv("Conv2d_1a_3x3", x, 32, (3, 3), 2, "VALID")
        x = _conv("Conv2d_2a_3x3", x, 32, (3, 3), 1, "VALID")
        x = _conv("Conv2d_2b_3x3", x, 64, (3, 3))
        x = _conv("Conv2d_3b_1x1", _halve(x), 80)
        x = _conv("Conv2d_4a_3x3", x, 192, (3, 3), 1, "VALID")
        x = _halve(x)
        for name, pool_features in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = MixedA(pool_features, name=f"Mixed_{name}")(x)
        x = MixedB(name="Mixed_6a")(x)
        taps = {}
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x, taps[name] = MixedC(width, name=f"Mixed_{name}")(x)
        x = MixedD(name="Mixed_7a")(x)
        for name, maximum in (("7b", False), ("7c", True)):
            x = MixedE(maximum, name=f"Mixed_{name}")(x)
        pool = jnp.mean(x, axis=(1, 2))
        logits, unbiased = Head(name="fc")(pool)
        return {
            "pool": pool,
            "spatial": taps["6d"][..., :_SPATIAL_CHANNELS].reshape(len(x), -1),
            "logits": logits,
            "logits_unbiased": unbiased,
        }


@functools.cache
def inception_shapes() -> dict:
    """The parameters' shapes: 94 convolutions with their normalizations, and `fc`."""
    image = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    return jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]


def is_published(path) -> bool:
    """Whether a weights file is the published one, by the beginning of its sha256, which its name carries.

    Other weights of the same shape give numbers that are no FID. A copy in another format has another
    digest, and is known only by `state_dict.fingerprint` of its parameters.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(PUBLISHED)


def inception_params(tensors: Mapping[str, np.ndarray], source) -> dict:
    """The state dict of the PyTorch weights as parameters of `Inception`.

    Raises ValueError, naming `source`, for tensors that are missing, left over or of another shape.
    """
    return to_parameters(tensors, _our_path, inception_shapes(), source)


_LEAVES = {
    "conv.weight": "kernel",
    "bn.weight": "scale",
    "bn.bias": "bias",
    "bn.running_mean": "mean",
    "bn.running_var": "var",
}


def _our_path(key: str) -> str | None:
    """ "Mixed_5b.branch1x1.conv.weight" -> "Mixed_5b/branch1x1/kernel"."""
    if key.endswith(".num_batches_tracked"):
        return None
    if key in ("fc.weight", "fc.bias"):
        return "fc/kernel" if key == "fc.weight" else "fc/bias"
    *modules, kind, leaf = key.split(".")
    ours = _LEAVES.get(f"{kind}.{leaf}")
    return "/".join([*modules, ours]) if modules and ours else key
