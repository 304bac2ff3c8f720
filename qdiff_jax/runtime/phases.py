"""Where a long job stands as a whole: which phase, how long so far, about how long still."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from absl import logging

from qdiff_jax.runtime.progress import format_seconds, progress


@contextlib.contextmanager
def phases(
    weights: Mapping[str, float], clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], None]]:
    """Yields `enter(name)`, which logs the phase, the time so far and an estimate of what is left.

    weights: relative cost of each phase, in order; 0 for one that an earlier run has finished. The
    estimate scales the elapsed time by the weight that is still to come, so it settles as phases pass.
    """
    began = clock()
    names = list(weights)

    def enter(name: str) -> None:
        position = names.index(name)
        passed = sum(weights[n] for n in names[:position])
        elapsed = clock() - began
        left = "time left not known yet"
        if passed:
            rest = sum(weights[n] for n in names[position:])
            left = f"about {format_seconds(elapsed / passed * rest)} left in all"
        logging.info(
            "[%d/%d] %s: %s so far, %s",
            position + 1,
            len(names),
            name,
            format_seconds(elapsed),
            left,
        )

    yield enter


@contextlib.contextmanager
def follow(what: str, every_seconds: float = 15.0) -> Iterator[Callable[..., None]]:
    """Yields `tell(done, total, **shown)` for work whose total is known only once it runs.

    Another total, or fewer done than before, starts a new count (a method's stages follow one another).
    """
    with contextlib.ExitStack() as stack:
        current: dict = {"total": None, "done": 0, "tell": None}

        def tell(done: int, total: int, **shown) -> None:
            if total != current["total"] or done < current["done"]:
                stack.close()
                current["tell"] = stack.enter_context(
                    progress(what, total, start=done - 1, every_seconds=every_seconds)
                )
                current["total"] = total
            current["done"] = done
            current["tell"](done, **shown)

        yield tell
