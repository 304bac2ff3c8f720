"""Small subjects for the analyses: random networks on a few steps, recorded once."""

import pytest

from qdiff_jax.analysis.subject import make_subject
from qdiff_jax.methods.run import make_sampler
from qdiff_jax.models import registry


def _subject(name):
    diffusion = registry.load(name)
    sampler = make_sampler(
        diffusion.source["schedule"], {"name": "ddim", "spacing": "uniform", "steps": 4}
    )
    return make_subject(diffusion, sampler, samples=4, calibration=4, batch=8)


@pytest.fixture(scope="session")
def unet():
    return _subject("random:miniature")


@pytest.fixture(scope="session")
def dit():
    return _subject("random:dit")
