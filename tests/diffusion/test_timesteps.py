import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_jax.diffusion.timesteps import make_timesteps

SPACINGS = [
    "uniform_floor",
    "quad",
    "leading",
    "trailing",
    "linspace",
    "spaced",
    "solver_leading",
    "solver_linspace",
]


@settings(deadline=None, max_examples=30, derandomize=True)
@given(spacing=st.sampled_from(SPACINGS), total=st.integers(3, 1200), share=st.floats(0.001, 0.99))
def test_every_grid_ascends_inside_the_schedule(spacing, total, share):
    steps = max(1, int(share * total))
    grid = make_timesteps(spacing, total, steps)
    assert np.all(np.diff(grid) >= 0)
    assert grid[0] >= 0
    assert grid[-1] <= total - 1
    assert np.all(grid == np.floor(grid))
    assert len(grid) == steps or (spacing == "uniform_floor" and len(grid) >= steps)
    if spacing not in ("quad",):
        assert len(set(grid)) == len(grid)


@pytest.mark.parametrize(
    ("spacing", "steps", "offset", "first", "last", "count"),
    [
        ("uniform", 100, 0, [0, 10, 20], 990, 100),
        (
            "uniform_floor",
            400,
            1,
            [1, 3, 5],
            999,
            500,
        ),  # 1000 // 400 = 2, as the official code runs it
        ("quad", 100, 0, [0, 0, 0, 0, 1, 2, 2, 3], 800, 100),
        ("leading", 400, 0, [0, 2, 4], 798, 400),
        ("leading", 50, 1, [1, 21, 41], 981, 50),
        ("trailing", 20, 0, [49, 99, 149], 999, 20),
        ("trailing", 7, 0, [142, 285, 428], 999, 7),
        ("linspace", 250, 0, [0, 4, 8, 12], 999, 250),
        ("spaced", 50, 0, [0, 20, 41, 61, 82, 102], 999, 50),
        ("spaced", 21, 0, [0, 50, 100, 150], 999, 21),
        ("linspace_fractional", 5, 0, [0.0, 249.75, 499.5], 999, 5),
        ("solver_linspace_fractional", 5, 0, [199.8, 399.6], 999, 5),
        ("solver_leading", 20, 1, [48, 95, 142], 941, 20),
        ("solver_linspace", 20, 0, [50, 100, 150], 999, 20),
    ],
)
def test_published_grids(spacing, steps, offset, first, last, count):
    grid = make_timesteps(spacing, 1000, steps, offset=offset)
    assert list(grid[: len(first)]) == first
    assert (grid[-1], len(grid)) == (last, count)


def test_the_respaced_grid_sums_its_strides():
    """At 50 % of 999 in 20 strides stands 499.5 - epsilon, where an exact half goes up to 500."""
    summed, exact = (make_timesteps(name, 1000, 21) for name in ("spaced", "linspace"))
    assert (summed[10], exact[10]) == (499, 500)
    for steps in (50, 100, 250):
        np.testing.assert_array_equal(
            *(make_timesteps(n, 1000, steps) for n in ("spaced", "linspace"))
        )


def test_uniform_runs_the_steps_that_were_asked_for_or_says_so():
    with pytest.raises(
        ValueError, match="would visit 500 timesteps, every 2 of 1000.*uniform_floor"
    ):
        make_timesteps("uniform", 1000, 400, offset=1)
    same = [make_timesteps(name, 1000, 500, offset=1) for name in ("uniform", "uniform_floor")]
    np.testing.assert_array_equal(*same)


def test_linspace_may_stop_early():
    assert list(make_timesteps("linspace", 200, 5, last=160)) == [0, 40, 80, 120, 160]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown timestep spacing 'karras'.*uniform.*quad"):
        make_timesteps("karras", 1000, 10)
    with pytest.raises(ValueError, match="steps must lie in 1..1000"):
        make_timesteps("uniform", 1000, 1001)
    with pytest.raises(ValueError, match="outside 0..999"):
        make_timesteps("trailing", 1000, 10, offset=1)
    with pytest.raises(ValueError, match="belongs to the spacing 'linspace'"):
        make_timesteps("quad", 1000, 10, last=500)
    with pytest.raises(ValueError, match="steps must be below 10"):
        make_timesteps("solver_leading", 10, 10)
