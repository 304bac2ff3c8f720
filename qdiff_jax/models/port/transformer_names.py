"""diffusers' names of a diffusion transformer -> those of the official files, by a table of modules.

diffusers numbers `transformer_blocks`, the official files `blocks`; diffusers has q, k and v apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """All: diffusers' name -> official name. keys: of whole keys. whole: of modules. in_block: of modules
    inside a block, "" for what lies in the block itself. copied: of modules of which each block holds a copy;
    one is kept, and the others must equal it. joined: official module -> diffusers' modules whose rows it
    holds, in this order."""

    keys: Mapping[str, str]
    whole: Mapping[str, str]
    in_block: Mapping[str, str]
    copied: Mapping[str, str]
    joined: Mapping[str, tuple[str, ...]]


def official_names(
    layout: Layout, tensors: Mapping[str, np.ndarray], source: object
) -> dict[str, np.ndarray]:
    """The state dict of diffusers under official names; names that have none are kept as they are.

    Raises ValueError for copies that differ, naming the first, or where a part of a joined layer is missing.
    """
    official: dict[str, np.ndarray] = {}
    split: dict[tuple[str, str, str], dict[str, np.ndarray]] = {}
    joined_of = {part: joined for joined, parts in layout.joined.items() for part in parts}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        blocks, _, place = module.partition(".")
        number, _, inner = place.partition(".")
        inside = blocks == "transformer_blocks"
        if key in layout.keys:
            official[layout.keys[key]] = tensor
        elif module in layout.whole:
            official[f"{layout.whole[module]}.{leaf}"] = tensor
        elif inside and inner in layout.in_block:
            parts = ("blocks", number, layout.in_block[inner], leaf)
            official[".".join(part for part in parts if part)] = tensor
        elif inside and inner in layout.copied:
            name = f"{layout.copied[inner]}.{leaf}"
            if not np.array_equal(official.setdefault(name, tensor), tensor):
                raise ValueError(
                    f"{source}: {key} is not the {name} of the first block, and this network has one "
                    "for all; the file was changed after it was converted."
                )
        elif inside and inner in joined_of:
            split.setdefault((number, joined_of[inner], leaf), {})[inner] = tensor
        else:
            official[key] = tensor
    for (number, joined, leaf), parts in split.items():
        name = f"blocks.{number}.{joined}.{leaf}"
        lacking = [part for part in layout.joined[joined] if part not in parts]
        if lacking:
            raise ValueError(f"{source} lacks {', '.join(lacking)}, parts of {name}.")
        official[name] = np.concatenate([parts[part] for part in layout.joined[joined]])
    return official
