"""Published networks at full size against the live modules of diffusers, through `save_pretrained`.

Every parameter of the published size, random weights; inputs are small where the size of the network does
not depend on them. The config read from the folder is that of `models.published`.

Measured (one x86-64 core, shared; wall seconds and peak memory of one test in its own process; largest
difference at t = 3, its limit, and the difference at t = 977, whose limit is 3e-4; outputs have standard
deviations of 0.4 to 1.2):

| network             | seconds |  GiB | t = 3   | limit   | t = 977 |
|---------------------|--------:|-----:|--------:|--------:|--------:|
| ddpm_cifar10        |      23 |  1.0 | 2.5e-06 | 1.0e-05 | 1.4e-05 |
| ddpm_256            |      48 |  1.9 | 2.5e-06 | 7.8e-06 | 1.3e-05 |
| lsun_beds256        |      46 |  3.6 | 2.6e-06 | 1.6e-05 | 1.5e-05 |
| lsun_churches256    |      86 |  4.2 | 3.5e-06 | 1.5e-05 | 1.3e-05 |
| adm_lsun256         |     127 |  6.7 | 3.8e-06 | 9.9e-06 | 1.1e-05 |
| cin256-v2           |      53 |  5.0 | 3.1e-06 | 1.1e-05 | 7.0e-06 |
| sd-v1-4             |     166 | 10.1 | 3.9e-06 | 1.2e-05 | 1.6e-05 |
| DiT-XL-2, official  |     101 |  8.9 | 5.0e-06 | 1.4e-05 | 1.1e-05 |
| DiT-XL-2, diffusers |      85 |  8.9 | 3.7e-06 | 1.2e-05 | 3.9e-05 |
| PixArt-XL-2-1024-MS |      74 |  7.4 | 5.0e-06 | 1.7e-05 | 1.5e-05 |

First stages, both in one process of 44 s and 2.4 GiB, largest difference and its limit: KL-f8 encoder 3.2e-6
(1.4e-5), decoder 5.6e-6 (4.7e-5); VQ-f4 encoder 5.3e-6 (3.4e-5), decoder 4.1e-6 (2.8e-5).
"""

import dataclasses
import gc
import shutil

import jax
import numpy as np
import pytest

from qdiff_jax.models.first_stage import FIRST_STAGES
from qdiff_jax.models.port.hub_folder import load_component
from qdiff_jax.models.port.unet_ldm_diffusers import from_diffusers
from qdiff_jax.models.published import PUBLISHED
from qdiff_jax.runtime.state_dicts import load_state_dict

from .comparisons import (
    TIMES,
    as_released,
    check,
    check_first_stage,
    dit_call,
    ours,
    pixart_call,
    unet_call,
)
from .published_options import CHURCHES, DIT_XL_2, PIXART_1024, STAGES, UNETS
from .references import both, build, draw, need, saved

need("torch", "diffusers")
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    """Deleted again, passed or failed: up to 3.4 GB."""
    yield tmp_path / "saved"
    shutil.rmtree(tmp_path / "saved", ignore_errors=True)
    gc.collect()


def parameters(component):
    return sum(leaf.size for leaf in jax.tree.leaves(component.params))


def published(name):
    """As a folder tells it: no dropout, no classes beside a context, attention in the order of the levels."""
    config = dataclasses.replace(PUBLISHED[name].network, dropout=0.0)
    if getattr(config, "context_dim", None) is not None:
        config = dataclasses.replace(config, num_classes=None, context_length=77)
    if hasattr(config, "attention_downsampling"):
        levels = tuple(sorted(config.attention_downsampling))
        config = dataclasses.replace(config, attention_downsampling=levels)
    return config


@pytest.mark.parametrize("name", UNETS)
def test_a_unet(name, folder):
    kind, options, y, side, count = UNETS[name]
    model = build("diffusers", kind, **options)
    x = draw(f"live {name}", 2, model.config.in_channels, side, side)
    saved(model, folder)
    expected, floor = both(model, unet_call(x, y))
    del model  # up to 7 GB in float64
    component = load_component(folder)
    assert component.config == published(name)
    assert parameters(component) == count
    check(ours(component, x, TIMES, y), expected, floor)


def test_ldm_8_of_the_churches(folder):
    """Eight heads everywhere, which the class cannot say: its attentions are told after it is built."""
    model = build("diffusers", "UNet2DModel", **CHURCHES)
    for module in model.modules():
        if type(module).__name__ == "Attention":
            module.heads = 8
    x = draw("live churches", 2, 4, 32, 32)
    saved(model, folder)
    expected, floor = both(model, unet_call(x, None))
    del model
    component = load_component(folder)
    config = published("lsun_churches256")
    told = dataclasses.replace(component.config, heads=8, head_channels=None)
    assert told == config
    # The order of queries, keys and values in our parameters depends on the heads.
    params = from_diffusers(load_state_dict(folder), config, folder)
    component = component._replace(config=config, params=params)
    assert parameters(component) == 294_966_916
    check(ours(component, x, TIMES, None), expected, floor)


@pytest.mark.parametrize("semantics", ["official", "diffusers"])
def test_dit_xl_2(semantics, folder):
    model = build("diffusers", "DiTTransformer2DModel", **DIT_XL_2)
    as_released(model, semantics)
    x, y = draw("live dit", 2, 4, 32, 32), np.int32([207, 1000])
    saved(model, folder)
    expected, floor = both(model, dit_call(x, y))
    del model
    component = load_component(folder)
    assert component.config == PUBLISHED["DiT-XL-2-256x256"].network
    assert parameters(component) == 675_129_632 - 256 * 1152  # the position table is computed
    check(ours(component, x, TIMES, y, semantics=semantics), expected, floor)


def test_pixart_alpha_of_1024_pixels(folder):
    """120 tokens, of which the first caption has 20. The float32 sinusoids of a size of 1024 differ between
    frameworks as those of late timesteps do: the sample at t = 3 has a small size, the other a real one."""
    model = build("diffusers", "PixArtTransformer2DModel", **PIXART_1024)
    x = draw("live pixart", 2, 4, 32, 32)
    y = {
        "context": draw("captions", 2, 120, 4096),
        "mask": np.float32(np.arange(120)[None] < np.array([[20], [120]])),
        "resolution": np.float32([[5, 6], [832, 1216]]),
        "aspect_ratio": np.float32([[1.0], [0.68]]),
    }
    saved(model, folder)
    expected, floor = both(model, pixart_call(x, y))
    del model
    component = load_component(folder)
    assert component.config == PUBLISHED["PixArt-XL-2-1024-MS"].network
    assert parameters(component) == 611_349_152
    check(ours(component, x, TIMES, y), expected, floor)


@pytest.mark.parametrize("name", STAGES)
def test_a_first_stage(name, folder):
    kind, options, count = STAGES[name]
    levels = len(options["block_out_channels"])
    model = build(
        "diffusers",
        kind,
        **options,
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    component = load_component(saved(model, folder))
    # The resolution places attention behind blocks, of which these have none.
    assert dataclasses.replace(component.config, resolution=256) == FIRST_STAGES[name]
    assert parameters(component) == count
    check_first_stage(model, component, (64, 64))
