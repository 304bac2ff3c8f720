"""The published protocols run the network as often, and at the timesteps, that their codes do."""

import numpy as np
import pytest

from qdiff_jax.data.images import UINT8_RULES
from qdiff_jax.diffusion.protocols import PROTOCOLS
from qdiff_jax.methods.run import make_sampler

VISITED = {  # noisiest first, and the last two
    "cifar10_ddim100_quad": ([800, 783], [0, 0]),
    "lsun_bedrooms_200_eta1": ([996, 991], [6, 1]),
    "lsun_churches_500_eta0": ([999, 997], [3, 1]),
    "lsun_churches_400_runs_500": ([999, 997], [3, 1]),
    "celebahq_200_eta0": ([996, 991], [6, 1]),
    "ffhq_200_eta1": ([996, 991], [6, 1]),
    "imagenet_20_cfg3": ([951, 901], [51, 1]),
    "sd14_plms50_cfg7p5": ([981, 961, 961, 941], [21, 1]),
    "dit_50_cfg1p5": ([999, 979, 958], [20, 0]),
    "dit_100_cfg1p5": ([999, 989], [10, 0]),
    "dit_250_cfg1p5": ([999, 995], [4, 0]),
    "pixart_dpm20_cfg4p5": ([999, 949.05], [99.9, 49.95]),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_timesteps_of_a_published_protocol(name):
    protocol = PROTOCOLS[name]
    plan = make_sampler(protocol.schedule, protocol.sampler)
    assert plan.steps == protocol.calls
    first, last = VISITED[name]
    visited = plan.timesteps[::-1]
    np.testing.assert_allclose(visited[: len(first)], first, rtol=1e-6)
    np.testing.assert_allclose(visited[-2:], last, rtol=1e-6)
    assert protocol.uint8 in UINT8_RULES
    # Noise exactly where the code adds it: never in an ODE, and not in the last step of DDPM.
    if protocol.sampler["name"] == "ddpm":
        assert plan.rows["fresh"].tolist() == [0.0] + [1.0] * (plan.steps - 1)
    else:
        eta = protocol.sampler["options"].get("eta", 0.0)
        assert np.all(plan.rows["sigma"] > 0) if eta else np.all(plan.rows["sigma"] == 0)


def test_churches_ask_for_400_steps_and_run_500():
    asked, ran = (PROTOCOLS[f"lsun_churches_{n}"] for n in ("400_runs_500", "500_eta0"))
    plans = [make_sampler(p.schedule, p.sampler) for p in (asked, ran)]
    for row in plans[0].rows:
        np.testing.assert_array_equal(plans[0].rows[row], plans[1].rows[row])
