"""The README's section on composing by hand runs as it is printed."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdiff_jax.export.qtensor import QTensor
from qdiff_jax.methods.registry import CalibrationSets
from qdiff_jax.quant.qparams import QParams
from qdiff_jax.quant.timed import TimeIndexed, check_schedule
from qdiff_jax.sites import flatten_sites
from qdiff_jax.stages.stage import initial_state
from qdiff_jax.stages.unit_steps import ReconstructConfig

from .stages import chain

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def blocks():
    section = re.search(r"^## Composing by hand\n(.*?)^## ", README.read_text(), re.M | re.S)
    code = re.findall(r"^```python\n(.*?)^```", section[1], re.M | re.S)
    assert len(code) == 3
    return code


def test_they_are_short(blocks):
    for block in blocks:
        assert len([line for line in block.splitlines() if line.strip()]) < 25


def test_a_layer_of_ones_own_module(blocks):
    scope: dict = {}
    exec(blocks[0], scope)
    params, table, x, y = (scope[name] for name in ("params", "table", "x", "y"))
    plain = scope["layer"].apply({"params": params}, x[1])
    error = np.abs(y - plain).mean() / np.abs(plain).mean()
    assert 1e-3 < error < 0.15  # four bits

    def quantized(x, t):
        return scope["quantized"](params, scope["weight"], table, x, t)

    # One row of the table per timestep, in a batch of mixed steps too; no row, no number.
    np.testing.assert_array_equal(table.table.scale, (x.max((1, 2)) - x.min((1, 2))) / 255)
    steps = jnp.resize(table.timesteps, (32,))
    mixed = quantized(x[1], steps)
    np.testing.assert_allclose(mixed[1::4], y[1::4], atol=1e-6)
    assert np.abs(mixed - y).max() > 1e-3
    assert np.isnan(quantized(x[1], 301.0)).all()


def test_what_the_main_job_works_with(blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(README.parent)
    whole = blocks[1]
    for given, mine in (
        ("/tmp/quickstart", str(tmp_path)),
        ("quickstart.py", "quickstart.py:smoke"),
    ):
        assert given in whole
        whole = whole.replace(given, mine)
    scope: dict = {}
    exec(whole, scope)
    assert {entry.bits for entry in scope["plan"].entries} == {4, 8}
    assert isinstance(scope["config"], ReconstructConfig)
    assert scope["sets"].weights.x.shape[1:] == scope["calibration"].x.shape[2:]
    assert (tmp_path / "trajectories" / "held_out.npz").exists()
    initial_state(scope["plan"], jax.random.key(0))
    assert set(scope["model"].params)


def test_a_method_of_ones_own(blocks):
    samples = chain.calibration(per_step=4)
    scope = {
        "jax": jax,
        "model": chain.model(),
        "plan": chain.plan(),
        "sets": CalibrationSets(samples, samples, chain.TIMESTEPS),
        "config": ReconstructConfig(steps=3, batch_size=4, lr=1.0, walk_batch=16),
    }
    exec(blocks[2], scope)
    sites = flatten_sites(scope["state"].quant)
    assert set(sites) == {entry.site for entry in chain.plan().entries}
    for name, held in sites.items():
        kinds = (QParams, QParams) if name.endswith("/qk") else (TimeIndexed, QTensor)
        assert (type(held.lhs), type(held.rhs)) == kinds, name
    check_schedule(scope["state"].quant, chain.TIMESTEPS)
    with pytest.raises(ValueError, match="never calibrated"):
        check_schedule(scope["state"].quant, [*chain.TIMESTEPS, 50.0])
