"""The persistent compile cache, and how many seconds went into compiling.

Compile time is real (seconds for every block shape), so it is reported apart from run time.
"""

import contextlib
import pathlib
import threading
import time
from collections.abc import Iterator

import jax

_BACKEND = "/jax/core/compile/backend_compile_duration"
_TRACE = "/jax/core/compile/jaxpr_trace_duration"
_LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_STAGES = (_BACKEND, _TRACE, _LOWER)
_HIT = "/jax/compilation_cache/cache_hits"


def enable_compile_cache(directory=None) -> pathlib.Path:
    """Keeps compiled programs on disk for the next run. Call before the first jit.

    Args:
      directory: by default `~/.cache/qdiff_jax/xla`. On several hosts give a folder that all of
        them see.
    """
    directory = pathlib.Path(directory or pathlib.Path.home() / ".cache" / "qdiff_jax" / "xla")
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Hundreds of small programs take longer to compile than to read back: keep every one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


class CompileAccount:
    """Filled in while `compile_account` is open: what was compiled, and how long it took.

    Attributes:
      seconds: wall, of tracing, lowering and backend compilation together; what lies inside another of
        these, or beside it in another thread, counts once.
      cpu_seconds: of all threads of the process meanwhile (the compiler has its own), on a shared core less
        than `seconds`; None where JAX did not say when one of them began, so that no clock was read there.
      backend_compiles: programs asked of the backend, those found in the disk cache included.
      cache_hits: how many of those were found there.
    """

    def __init__(self):
        self.seconds = 0.0
        self.cpu_seconds: float | None = 0.0
        self.backend_compiles = 0
        self.cache_hits = 0


@contextlib.contextmanager
def compile_account() -> Iterator[CompileAccount]:
    """Counts the compilations inside the `with` block (of all threads). May be nested.

    Example:
      with compile_account() as account: run()
      print(account.seconds, account.cpu_seconds, account.backend_compiles, account.cache_hits)
    """
    account = CompileAccount()
    lock = threading.Lock()
    underway, began = 0, (0.0, 0.0)

    # JAX records a scalar when one of these begins, and a duration, also on an exception, when it ends.
    def on_scalar(event, _value, **_):
        nonlocal underway, began
        if event in _STAGES:
            with lock:
                if not underway:
                    began = (time.monotonic(), time.process_time())
                underway += 1

    def on_duration(event, seconds, **_):
        nonlocal underway
        if event not in _STAGES:
            return
        with lock:
            account.backend_compiles += event == _BACKEND
            if not underway:
                account.seconds += seconds
                account.cpu_seconds = None
                return
            underway -= 1
            if not underway:
                account.seconds += time.monotonic() - began[0]
                if account.cpu_seconds is not None:
                    account.cpu_seconds += time.process_time() - began[1]

    def on_event(event, **_):
        if event == _HIT:
            account.cache_hits += 1

    jax.monitoring.register_scalar_listener(on_scalar)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        yield account
    finally:
        jax.monitoring.unregister_scalar_listener(on_scalar)
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)
