"""Config arguments, conversion to dataclasses, fingerprints, and the guard of a workdir."""

import dataclasses
import json

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax import config


def _parse(arg):
    return config.parse_arg(arg, bits=("w4a8", "w8a8"), smoke=False, seed=0, lr=0.1, name="x")


def test_arguments():
    assert vars(_parse(None)) == dict(bits="w4a8", smoke=False, seed=0, lr=0.1, name="x")
    got = _parse("w8a8, smoke,seed=3,lr=1e-3,name=y")
    assert vars(got) == dict(bits="w8a8", smoke=True, seed=3, lr=1e-3, name="y")
    assert _parse("bits=w8a8,smoke=false") == _parse("w8a8")


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("smok", "did you mean 'smoke'"),
        ("w8a9", "did you mean 'w8a8'"),
        ("sed=3", "did you mean 'seed'"),
        ("seed", "write seed="),
        ("seed=1.5", "seed=1.5 must be of type int"),
        ("smoke=maybe", "true or false"),
        ("bits=w1", "one of w4a8, w8a8"),
    ],
)
def test_wrong_arguments(arg, message):
    with pytest.raises(ValueError, match=message):
        _parse(arg)


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float
    sizes: tuple[int, ...] = (1,)
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str
    flag: bool = False
    pair: tuple[int, float] = (0, 0.0)
    free: dict = dataclasses.field(default_factory=dict)


def test_nested_conversion():
    values = ml_collections.ConfigDict(
        dict(inner=dict(rate=1, sizes=[2, 3]), name="n", pair=(1, 2), free=dict(anything=1))
    )
    got = config.to_dataclass(Outer, values)
    assert got == Outer(Inner(1.0, (2, 3)), "n", pair=(1, 2.0), free={"anything": 1})
    assert isinstance(got.inner.rate, float)
    assert hash(got.inner)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(inner=dict(rate=1, size=2), name="n"), "config.inner.size is not known.*'sizes'"),
        (dict(inner=dict(rate=1)), "config.name is missing"),
        (dict(inner=dict(rate="1"), name="n"), "config.inner.rate must be of type float"),
        (dict(inner=dict(rate=True), name="n"), "config.inner.rate must be of type float"),
        (dict(inner=dict(rate=1, limit=1.5), name="n"), "config.inner.limit must be of type int"),
        (dict(inner=dict(rate=1, sizes=(1, "2")), name="n"), r"config.inner.sizes\[1\]"),
        (dict(inner=3, name="n"), "config.inner must be a sub-dict"),
        (dict(inner=dict(rate=1), name="n", pair=(1,)), "config.pair must have 2 entries"),
    ],
)
def test_wrong_configs_are_named_by_path(values, message):
    with pytest.raises(ValueError, match=message):
        config.to_dataclass(Outer, values)


_VALUES = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(max_size=3))


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), _VALUES, min_size=2))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_fingerprint_ignores_order_only(values):
    backwards = dict(reversed(values.items()))
    assert config.fingerprint(values) == config.fingerprint(backwards)
    name = next(iter(values))
    assert config.fingerprint({**values, name: "another"}) != config.fingerprint(values)


def test_fingerprint_is_the_same_on_every_machine():
    # A golden value: were it to change, no workdir of an older version could be resumed.
    values = dict(a=1, b=dict(c=(1.5, None), d="x"))
    expected = "701d68c209435136297222cb327a46fbebee6bf3101232d79fed25abd36a89d5"
    assert config.fingerprint(values) == expected
    assert config.fingerprint({**values, "run": dict(log=3)}, ("run",)) == expected
    assert config.fingerprint({**values, "runs": 3}, ("run",)) != expected


def test_workdir_refuses_another_experiment(tmp_path):
    first = Outer(Inner(1.0), "n")
    assert not config.claim_workdir(tmp_path / "w", first)
    assert config.claim_workdir(tmp_path / "w", first)
    other = Outer(Inner(2.0), "m")
    with pytest.raises(ValueError, match="inner.rate: 1.0 there, 2.0 now; name: n there, m now"):
        config.claim_workdir(tmp_path / "w", other)
    assert config.claim_workdir(tmp_path / "w", other, ("inner.rate", "name"))
    (tmp_path / "w" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        config.claim_workdir(tmp_path / "w", first)


def test_a_new_option_does_not_orphan_old_workdirs(tmp_path):
    new = Outer(Inner(1.0), "n")
    old = config.as_json(new)
    del old["flag"]
    assert not config.claim_workdir(tmp_path, old)
    assert config.claim_workdir(tmp_path, new)
    with pytest.raises(ValueError, match="flag: False there, True now"):
        config.claim_workdir(tmp_path, dataclasses.replace(new, flag=True))


def test_config_files_load_by_path(tmp_path):
    path = tmp_path / "some_config.py"
    path.write_text(
        "import ml_collections\n"
        "from qdiff_jax.config import parse_arg\n"
        "def get_config(arg=None):\n"
        "    arg = parse_arg(arg, smoke=False)\n"
        "    return ml_collections.ConfigDict(dict(a=dict(b=1, t=(1, 2)), smoke=arg.smoke))\n"
    )
    loaded = config.load_config(f"{path}:smoke", {"a.b": 5, "a.t": (3,)})
    assert json.loads(json.dumps(loaded.to_dict())) == {"a": {"b": 5, "t": [3]}, "smoke": True}
    assert loaded.is_locked
    with pytest.raises(ValueError, match="no key 'a.bb'; did you mean 'a.b'"):
        config.load_config(str(path), {"a.bb": 1})
    with pytest.raises(ValueError, match="no config file"):
        config.load_config(str(tmp_path / "none.py"))
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match="no function get_config"):
        config.load_config(str(path))
