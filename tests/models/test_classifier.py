"""The classifier keeps its promises: shapes, types, features before the head, inputs refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.models.classifier import Classifier, ClassifierConfig

TINY = ClassifierConfig(
    widths=(4, 8),
    blocks=(1, 1),
    feature_dim=6,
    resolution=8,
    in_channels=3,
    num_classes=5,
    dropout=0.5,
)


def _init(config, shape=(2, 8, 8, 3)):
    model = Classifier(config)
    x = jax.random.uniform(jax.random.key(0), shape, minval=-1.0)
    return model, model.init(jax.random.key(1), x), x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_are_float32_and_parameters_too(dtype):
    model, variables, x = _init(ClassifierConfig(**{**vars(TINY), "dtype": dtype}))
    logits, features = model.apply(variables, x)
    assert (logits.shape, features.shape) == ((2, 5), (2, 6))
    assert logits.dtype == features.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert float(features.min()) >= 0


def test_logits_are_the_head_of_the_features():
    model, variables, x = _init(TINY)
    logits, features = model.apply(variables, x)
    head = variables["params"]["head"]
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"][None], rtol=1e-5)


def test_an_image_does_not_see_its_neighbours():
    # No batch statistics: a score must not depend on what it is batched with.
    model, variables, x = _init(TINY)
    together = model.apply(variables, x)[0]
    alone = model.apply(variables, x[1:])[0]
    np.testing.assert_allclose(together[1:], alone, rtol=1e-5, atol=1e-6)


def test_dropout_is_off_unless_training():
    model, variables, x = _init(TINY)
    first, second = (
        model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(i)})[0]
        for i in range(2)
    )
    assert (first != second).any()


def test_what_does_not_fit_is_refused():
    model, variables, _ = _init(TINY)
    with pytest.raises(ValueError, match=r"takes images .*8, 8, 3.*got \(2, 8, 8, 1\)"):
        model.apply(variables, jnp.zeros((2, 8, 8, 1)))
    with pytest.raises(ValueError, match="equal lengths"):
        ClassifierConfig(widths=(4,), blocks=(1, 1))
    with pytest.raises(ValueError, match="divisible by 8"):
        ClassifierConfig(resolution=28)
    with pytest.raises(ValueError, match="float16"):
        ClassifierConfig(dtype="float16")
