"""Descriptions of trees: later types can be added, and nothing is lost or guessed in silence."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.export import encode
from qdiff_jax.export.encode import Codec, dataclass_codec, decode_tree, encode_tree, register
from qdiff_jax.quant.qparams import QParams


@dataclasses.dataclass
class Branch:
    down: object
    up: object
    rank: int = 0


@pytest.fixture
def registry(monkeypatch):
    for name in ("_BY_NAME", "_BY_CLASS"):
        monkeypatch.setattr(encode, name, dict(getattr(encode, name)))


def branch_codec(name="Branch", cls=Branch):
    plain = (int, int)
    return dataclass_codec(name, cls, {"down": "branches", "up": None}, {"rank": plain})


@pytest.mark.usefixtures("registry")
def test_a_type_added_later_goes_through_json_and_back():
    register(branch_codec())
    tree = {"a": Branch(jnp.arange(3), {"x": jnp.ones((2, 1))}, 7), "b": None, "c": {}}
    node, arrays, kinds = encode_tree(tree, "root", "other")
    assert kinds == {"root/a/down": "branches", "root/a/up/x": "other"}
    back = decode_tree(json.loads(json.dumps(node)), arrays.__getitem__)
    assert set(back) == set(tree)
    assert back["b"] is None
    assert back["c"] == {}
    assert back["a"].rank == 7
    assert np.array_equal(np.asarray(back["a"].down), np.arange(3))
    assert back["a"].up["x"].shape == (2, 1)


@pytest.mark.usefixtures("registry")
def test_a_field_that_a_description_lacks_takes_its_default():
    register(branch_codec())
    node, arrays, _ = encode_tree(Branch(jnp.ones(()), jnp.ones(()), 7), "root", "other")
    del node["fields"]["rank"]
    assert decode_tree(node, arrays.__getitem__).rank == 0


@pytest.mark.usefixtures("registry")
def test_a_name_or_a_class_is_registered_once():
    with pytest.raises(ValueError, match="clashes"):
        register(branch_codec(name="QParams"))
    with pytest.raises(ValueError, match="clashes"):
        register(Codec("Grid", QParams, None, None))


def test_a_field_that_no_codec_describes_is_refused():
    with pytest.raises(ValueError, match="describe every field"):
        dataclass_codec("Branch", Branch, {"down": None, "up": None})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": 1.0}, "root/a is a float"),
        ({"a": (np.zeros(1),)}, "root/a is a tuple"),
        ({"a": np.zeros(1)}, "root/a is float64"),
        ({0: np.zeros(1, np.float32)}, "must be strings"),
    ],
)
def test_what_has_no_description_is_refused_by_name(tree, message):
    with pytest.raises(TypeError, match=message):
        encode_tree(tree, "root", "other")


def test_two_arrays_never_share_a_name():
    one = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="stored as root/a/b"):
        encode_tree({"a/b": one, "a": {"b": one}}, "root", "other")


def test_scalars_and_transposed_arrays_keep_shape_and_values():
    tree = {"s": np.array(3, np.int32), "t": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    _, arrays, _ = encode_tree(tree, "r", "other")
    assert arrays["r/s"].shape == ()
    assert arrays["r/t"].flags.c_contiguous
    assert np.array_equal(arrays["r/t"], tree["t"])


@pytest.mark.parametrize("node", [3, {"tensor": "x", "dict": {}}, {"type": "QParams"}, []])
def test_nodes_of_no_known_form_are_refused(node):
    with pytest.raises(ValueError, match="no description"):
        decode_tree(node, {}.__getitem__)
