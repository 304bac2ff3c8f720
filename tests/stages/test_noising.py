"""Images noised to random steps: as a fixed set, and anew for every batch."""

import jax
import jax.numpy as jnp
import numpy as np

from qdiff_jax.diffusion.schedule import make_schedule
from qdiff_jax.stages.noising import noised_set


def test_noised_images_carry_their_noise_and_some_null_labels():
    schedule = make_schedule("linear", 1000)
    images = np.full((200, 2, 2, 1), 0.5, np.float32)
    made = noised_set(jax.random.key(0), schedule, images, np.zeros(200, np.int32), 9, 0.5)
    signal = np.sqrt(schedule.alpha_bar[made.t.astype(int)])[:, None, None, None]
    rebuilt = signal * 0.5 + np.sqrt(1 - signal**2) * made.eps_fp
    np.testing.assert_allclose(made.x, rebuilt, rtol=1e-4, atol=1e-5)
    assert 50 < (made.y == 9).sum() < 150
    assert made.t.min() < 100
    assert made.t.max() > 900
    assert jnp.all(made.index == -1)
