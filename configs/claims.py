"""The claims of the papers, one part of a method each, as pairs of runs: with the part and without it.

    python -m experiments.claims --config=configs/claims.py --out=W
    python -m experiments.claims --config=configs/claims.py:claim=fsc,seeds=1 --out=W
    python -m experiments.claims --config=configs/claims.py:group=unet_methods,seed=0 --out=W

Papers: PTQ4DM (arXiv:2211.15736), Q-Diffusion (2302.04304), TFMQ-DM (2311.16503), TDQ (2306.02316), TCAQ-DM
(2412.16700), PTQD (2305.10657), PTQ4DiT (2405.16005), SVDQuant (2411.05007), EfficientDM (2310.03270), BinaryDM
(2404.05662). Every run is a config of configs/methods at its `laptop` size, measured on 256 samples from shared
noise over 20 steps without guidance, with three seeds, or five on the U-Net where no weights are learned; a run
that two claims share is made once. The claims are in configs/_claims_unet.py and configs/_claims_more.py. Words
behind the colon choose what is run: `claim=NAME`, `model=unet` or `model=dit` (default: both), `seed=N` for
that seed alone, `group=unet_methods` (the six methods for U-Nets, on the U-Net) or `group=dit_tuned_binary`
(all else); several processes may share one --out. `seeds=N` gives the chosen claims that many, `bits=w4a4`
takes them to other bits. The ledger is written of everything that lies in --out.

Cost on one core, another one busy:

    `group=unet_methods`: 115 runs, some 4.4 CPU hours (commit 76e7dc7); 256 rollouts are a minute of each
    `group=dit_tuned_binary`: 150 runs, 6 CPU hours beside those of the other group, reckoned from single runs
                              and not yet measured as a whole

Expected result: experiments/results/claims.md, for now of `group=unet_methods` alone.
`claims.py:smoke` pairs two runs on a miniature.
"""

import ml_collections

from configs import _claims_more, _claims_unet
from configs._claims import side, written
from qdiff_jax.config import parse_arg

MODELS = ("unet", "dit")
GROUPS = (_claims_unet.GROUP, _claims_more.GROUP)
# In the order of the ledger: (group, model, claims).
TABLES = (
    (_claims_unet.GROUP, "unet", _claims_unet.CLAIMS),
    (_claims_more.GROUP, "unet", _claims_more.UNET),
    (_claims_more.GROUP, "dit", _claims_unet.TAKEN | _claims_more.DIT),
)


def get_config(arg=None):
    arg = parse_arg(
        arg,
        claim="all",
        model=("both", *MODELS),
        group=("all", *GROUPS),
        bits="",
        seeds=0,
        seed=-1,
        smoke=False,
    )
    config = ml_collections.ConfigDict()
    config.samples = 4 if arg.smoke else 256
    # Without guidance, as the papers' pixel and LSUN models are sampled, and at half the cost.
    config.guidance_scale = -1.0
    claims, chosen = [], []
    for group, model, table in TABLES:
        for name, values in table.items():
            if (
                arg.claim in ("all", name)
                and arg.model in ("both", model)
                and arg.group in ("all", group)
            ):
                chosen += [(model, each) for each in (values["of"] or (name,))]
    for group, model, table in TABLES:
        for name, values in table.items():
            bits = ""
            if (model, name) in chosen:
                values, bits = {**values, "seeds": arg.seeds or values["seeds"]}, arg.bits
            claims.append(written(name, group, model, values, bits))
    names = {name: [c[2] for c in claims if c[0] == name] for name in (c[0] for c in claims)}
    if arg.claim not in ("all", *names):
        raise ValueError(f"claim={arg.claim!r} is unknown; there are {sorted(names)}.")
    if not chosen:
        where = "" if arg.claim == "all" else f" {arg.claim} is asked of {names[arg.claim]}."
        raise ValueError(
            f"claim={arg.claim}, model={arg.model} and group={arg.group} have nothing in common.{where}"
        )
    longest = max(claim[8] for claim in claims if (claim[2], claim[0]) in chosen)
    if arg.seed >= longest:
        raise ValueError(
            f"seed={arg.seed} is none of the {longest} of the claims chosen, which count from 0."
        )
    if arg.smoke:
        claims, chosen = [_smoke(arg.seeds or 1)], [("unet", "fsc")]
    config.claims = tuple(claims)
    config.chosen = tuple(dict.fromkeys(chosen))
    config.only_seeds = () if arg.seed < 0 else (arg.seed,)
    return config


def _smoke(seeds):
    values = _claims_unet.CLAIMS["fsc"]
    sides = tuple(side(file, f"{words},smoke".lstrip(",")) for file, words, _ in values["sides"])
    return written("fsc", GROUPS[0], "unet", {**values, "sides": sides, "seeds": seeds})
