"""Compiled programs are let go when they are many, and made again when they are needed."""

import jax
import jax.numpy as jnp

from qdiff_jax.runtime.programs import mapped_share, release_programs


def test_programs_are_dropped_above_the_share_and_regions_come_back():
    share = mapped_share()
    assert 0.0 <= share < 1.0
    assert not release_programs(above=1.0)
    x = jnp.arange(4.0)
    held = [jax.jit(lambda x, i=i: x * i + 1.0) for i in range(20)]
    values = [f(x) for f in held]
    grown = mapped_share()
    if share == 0.0:  # not on Linux
        assert not release_programs(above=0.0)
        return
    assert grown > share
    assert release_programs(above=0.0)
    assert mapped_share() < grown
    assert all((f(x) == value).all() for f, value in zip(held, values, strict=True))
