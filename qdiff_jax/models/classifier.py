"""A small image classifier: the labels and the features by which generated images are judged.

Made to be trained in minutes on a CPU: a strided stem, so that no 3x3 convolution runs at full
resolution (there XLA:CPU's weight gradients are slowest), residual blocks of one convolution, and
a normalization over channels only, which needs neither batch statistics nor a pass over the image.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """widths: channels at 16x16, 8x8 and 4x4 (the last is the feature dimension); blocks: residual
    blocks at each; in_channels: 1 or 3; dtype: computation dtype, parameters are float32."""

    widths: tuple[int, ...] = (32, 64, 128)
    blocks: tuple[int, ...] = (1, 2, 2)
    in_channels: int = 1
    num_classes: int = 10
    dropout: float = 0.2
    dtype: str = "float32"

    def __post_init__(self):
        if len(self.widths) != len(self.blocks) or not self.widths:
            raise ValueError(
                f"widths {self.widths} and blocks {self.blocks} must have equal lengths."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r} is not one of float32, bfloat16.")


def _rms_norm(name: str, x: jax.Array) -> jax.Array:
    """Over channels, computed in float32 whatever the dtype of x."""
    return nn.RMSNorm(dtype=jnp.float32, name=name)(x.astype(jnp.float32)).astype(x.dtype)


class Classifier(nn.Module):
    """Images in [-1, 1] -> (logits [B, num_classes], features [B, widths[-1]]), all float32.

    Images are [B, H, W, in_channels]. The features are the pooled activations before the last
    layer, hence not negative. H and W must be divisible by 2**len(widths). With `train=True` a
    `dropout` rng is needed.
    """

    config: ClassifierConfig

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> tuple[jax.Array, jax.Array]:
        config = self.config
        dtype = jnp.dtype(config.dtype)
        if x.ndim != 4 or x.shape[-1] != config.in_channels:
            raise ValueError(
                f"the classifier takes [B, H, W, {config.in_channels}] images, got {x.shape}."
            )
        x = x.astype(dtype)
        for stage, (width, blocks) in enumerate(zip(config.widths, config.blocks)):
            # 5x5 at the input, where there is one channel; 2x2 patches between stages.
            kernel = (5, 5) if stage == 0 else (2, 2)
            x = nn.Conv(width, kernel, strides=(2, 2), dtype=dtype, name=f"down_{stage}")(x)
            for block in range(blocks):
                h = nn.relu(_rms_norm(f"norm_{stage}_{block}", x))
                x = x + nn.Conv(width, (3, 3), dtype=dtype, name=f"conv_{stage}_{block}")(h)
        x = nn.relu(_rms_norm("norm_out", x))
        features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        h = nn.Dropout(config.dropout, deterministic=not train)(features)
        return nn.Dense(config.num_classes, name="head")(h), features
