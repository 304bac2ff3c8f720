"""How the tables of claims are written: sides, and what a claim says beside them."""

METHODS = "configs/methods"
UNKNOWN = "no published figure known"
# Runs without weights that are learned take a minute: they can have more seeds.
CHEAP, DEAR = 5, 3


def side(file, words="", *changes):
    """A config of configs/methods at its `laptop` size: its words beside bits and model, and keys "a.b=value"
    that it has no word for."""
    return file, words, changes


def claim(method, part, with_it, without, bits, published=UNKNOWN, **more):
    """with_it, without: sides, or pairs of sides (with and without) of which the first is held against the
    second. more: seeds, aim (`experiments.claim_runs.AIMS`)."""
    both = (with_it, without)
    paired = isinstance(with_it[0], tuple)
    return {
        "method": method,
        "part": part,
        "sides": (*with_it, *without) if paired else both,
        "bits": bits,
        "published": published,
        "seeds": DEAR,
        "aim": "error",
        "of": (),
        **more,
    }


def every(method, part, of, bits, published=UNKNOWN):
    """A claim that holds where all of the claims `of` do; it has no runs of its own."""
    own = {"method": method, "part": part, "sides": (), "bits": bits, "published": published}
    return {**own, "seeds": DEAR, "aim": "error", "of": tuple(of)}


def written(name, group, model, values, bits=""):
    """A claim as `experiments.claim_runs.Claim` reads it. bits: in place of the claim's own."""
    bits = bits or values["bits"]
    sides = []
    for file, words, changes in values["sides"]:
        given = ",".join(filter(None, (bits, "laptop", words, f"model={model}")))
        sides.append((f"{METHODS}/{file}.py:{given}", tuple(changes)))
    texts = (values["method"], values["part"], bits)
    last = (values["aim"], values["seeds"], values["published"], values["of"])
    return (name, group, model, *texts, tuple(sides), *last)
