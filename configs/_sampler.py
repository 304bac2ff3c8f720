"""The sub-dict `sampler` of a config, whole, so that each of its keys can be a flag."""

KEYS = dict(
    name="ddim",
    spacing="uniform",
    steps=20,
    eta=0.0,
    guidance_scale=-1.0,
    tensor_bits=0,
    offset=0,
    final="",
    variance="",
    guided_channels=0,
    start="",
    interpolation="",
    shift=0.0,
    mu=0.0,
)


def sampler(**own):
    """KEYS (`experiments.quantize_config.SamplerConfig`), some of them set. Raises TypeError for another."""
    if other := set(own) - set(KEYS):
        raise TypeError(f"a sampler has no {sorted(other)}; there are {sorted(KEYS)}.")
    return {**KEYS, **own}
