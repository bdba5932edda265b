"""Work in a process of its own, so that the memory it needs is gone when it is done.

What JAX and TensorFlow have had stays with their process. The Hexagon compiler, a process too, needs two to three times
the weights of a graph, and what waits for it must not hold them as well.
"""

import concurrent.futures
import multiprocessing
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nd_jax.errors import UserError, quiet_libraries


def apart(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a new process.

    Args:
      what: is done, for the message when the process dies.
      function: of a module; it, the arguments and the result are pickled. What it raises is raised here.

    Raises:
      UserError: the process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=quiet_libraries) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(f"{what}: its process was killed, most likely for want of memory; free some") from error
