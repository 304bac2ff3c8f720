import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.diffusion.guidance import branches, classifier_free, combine, evaluate
from qdiff_jax.quant.timed import from_rows, select, step_context

CTX = step_context(5.0, 0)
X = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
Y = jnp.array([1, 2, 3], jnp.int32)
NULL = 9
# A step table with another value in the unconditional branch: 10 conditional, 20 unconditional.
TABLE = from_rows([[jnp.float32(10.0)], [jnp.float32(20.0)]], [5.0], branched=True)


def network(seen):
    """eps = label + (10 or 20 by the branch of the row), noting the shapes of every call."""

    def predict(variables, x, ctx, y):
        seen.append((x.shape[0], np.shape(ctx.branch)))
        offset = jnp.broadcast_to(select(variables["table"], ctx), y.shape)
        rows = y.astype(jnp.float32) + offset
        return x + rows.reshape(-1, 1, 1, 1)

    return predict


def run(guidance, y=Y):
    seen = []
    eps, raw = evaluate(network(seen), guidance, {"table": TABLE}, X, CTX, y)
    return eps, raw, seen


@pytest.mark.parametrize("form", ["batch", "calls"])
def test_formula_branches_and_null_labels(form):
    guidance = classifier_free(3.0, NULL, form=form)
    eps, raw, seen = run(guidance)
    labels = Y.astype(jnp.float32).reshape(-1, 1, 1, 1)
    conditional, unconditional = X + labels + 10.0, X + 9.0 + 20.0
    assert raw.shape == (3, 2, 2, 2, 4)
    np.testing.assert_allclose(raw[:, 0], conditional, rtol=1e-6)
    np.testing.assert_allclose(raw[:, 1], unconditional, rtol=1e-6)
    expected = unconditional + 3.0 * (conditional - unconditional)
    np.testing.assert_allclose(eps, expected, rtol=1e-5)
    assert seen == ([(6, (6,))] if form == "batch" else [(3, ()), (3, ())])
    assert branches(guidance) == (0, 1)


@pytest.mark.parametrize("order", ["pairs", "conditional_first", "unconditional_first"])
def test_the_order_of_the_rows_changes_nothing_but_their_places(order):
    guidance = classifier_free(3.0, NULL, order=order)
    received = []

    def predict(variables, x, ctx, y):
        received.append((y.tolist(), ctx.branch.tolist()))
        return network([])(variables, x, ctx, y)

    eps, raw = evaluate(predict, guidance, {"table": TABLE}, X, CTX, Y)
    expected = run(classifier_free(3.0, NULL, form="calls"))
    np.testing.assert_array_equal(eps, expected[0])
    np.testing.assert_array_equal(raw, expected[1])
    assert received == [
        {
            "pairs": ([1, 9, 2, 9, 3, 9], [0, 1, 0, 1, 0, 1]),
            "conditional_first": ([1, 2, 3, 9, 9, 9], [0, 0, 0, 1, 1, 1]),
            "unconditional_first": ([9, 9, 9, 1, 2, 3], [1, 1, 1, 0, 0, 0]),
        }[order]
    ]


def test_scales_that_need_one_evaluation():
    for scale, branch, labels in ((1.0, 0, Y), (0.0, 1, jnp.full_like(Y, NULL))):
        guidance = classifier_free(scale, NULL)
        eps, raw, seen = run(guidance)
        expected = X + (labels.astype(jnp.float32) + 10.0 * (branch + 1)).reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(eps, expected, rtol=1e-6)
        assert seen == [(3, ())]
        assert raw.shape == (3, 1, 2, 2, 4)
        assert branches(guidance) == (branch,)


def test_without_guidance_labels_pass_unchanged():
    assert classifier_free(None, NULL) is None
    assert branches(None) == (0,)
    received = []

    def predict(variables, x, ctx, y):
        received.append(y)
        return x

    evaluate(predict, None, {}, X, CTX, None)
    evaluate(predict, None, {}, X, CTX, Y)
    assert received[0] is None
    assert received[1] is Y


def test_scale_is_data():
    guidance = classifier_free(2.0, NULL)
    doubled = jax.jit(lambda g: combine(g, X, 0.0 * X))(guidance.replace(scale=jnp.float32(4.0)))
    np.testing.assert_allclose(doubled, 4.0 * X, rtol=1e-6)
    assert jax.tree.structure(guidance) == jax.tree.structure(classifier_free(7.5, NULL))


def test_some_channels_only():
    guidance = classifier_free(4.0, NULL, channels=3)
    conditional, unconditional = X, 0.5 * X
    combined = combine(guidance, conditional, unconditional)
    np.testing.assert_allclose(combined[..., :3], 2.5 * X[..., :3], rtol=1e-6)
    np.testing.assert_array_equal(combined[..., 3], conditional[..., 3])
    # Scale 0 still needs the conditional branch for the other channels.
    assert branches(classifier_free(0.0, NULL, channels=3)) == (0, 1)


def test_labels_may_be_a_tree_of_embeddings():
    y = {"text": jnp.ones((3, 5, 7)), "size": jnp.ones((3, 2))}
    null = {"text": np.zeros((5, 7), np.float32), "size": np.full((2,), 0.25, np.float32)}

    def predict(variables, x, ctx, y):
        rows = jnp.mean(y["text"], axis=(1, 2)) + jnp.mean(y["size"], axis=1)
        return jnp.broadcast_to(rows.reshape(-1, 1, 1, 1), x.shape)

    _, raw = evaluate(predict, classifier_free(2.0, null), {}, X, CTX, y)
    np.testing.assert_allclose(raw[:, 0], 2.0)
    np.testing.assert_allclose(raw[:, 1], 0.25)
    _, kept = evaluate(predict, classifier_free(2.0, {"text": null["text"]}), {}, X, CTX, y)
    np.testing.assert_allclose(kept[:, 1], 1.0)  # sizes as they are in y
    leading = jax.tree.map(lambda leaf: leaf[None], null)
    _, again = evaluate(predict, classifier_free(2.0, leading), {}, X, CTX, y)
    np.testing.assert_array_equal(again, raw)


def test_a_null_that_is_no_row_of_the_conditioning_is_refused():
    text = jnp.ones((3, 5, 7))
    with pytest.raises(ValueError, match=r"shape \(4, 7\) is no row of y.*\(5, 7\)"):
        run(classifier_free(2.0, np.zeros((4, 7), np.float32)), y=text)
    with pytest.raises(ValueError, match=r"shape \(\) is no row of y"):
        run(classifier_free(2.0, NULL), y=text)  # a class index where there is a context
    with pytest.raises(ValueError, match="null conditioning has the structure"):
        run(classifier_free(2.0, {"txt": np.zeros((5, 7), np.float32)}), y={"text": text})
    with pytest.raises(ValueError, match="null conditioning has the structure"):
        run(classifier_free(2.0, np.zeros((5, 7), np.float32)), y={"text": text})


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="needs labels y"):
        run(classifier_free(2.0, NULL), y=None)
    with pytest.raises(ValueError, match="unknown form of guidance 'serial'"):
        classifier_free(2.0, NULL, form="serial")
    with pytest.raises(ValueError, match="unknown order of guided rows 'cond'"):
        classifier_free(2.0, NULL, order="cond")
    with pytest.raises(ValueError, match="at least 1"):
        classifier_free(2.0, NULL, channels=0)
