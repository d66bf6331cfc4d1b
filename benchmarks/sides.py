"""The sides of a comparison, each in a process of its own, as their users run them: in one process
they would share the allocator and oneDNN's cache of kernels. For benchmarks/benchmark.py.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator


class Side:
    """An object in a process that waits for its turns."""

    def __init__(self, build: Callable, *args):
        """`build(*args)` returns the object; it is called there, while others are built."""
        self._args = args
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, build, args))
        self._process.start()
        other.close()

    def ask(self, method: str, *args):
        """What the object's method returns, or raise what it raises."""
        try:
            self._pipe.send((method, args))
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"The process of {self._args} ended: perhaps there was too little memory"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self):
        self._process.terminate()
        self._process.join()


def _serve(pipe, build, args):
    with contextlib.suppress(EOFError):  # nobody asks any more
        try:
            built = build(*args)
            while True:
                method, method_args = pipe.recv()
                pipe.send(getattr(built, method)(*method_args))
        except EOFError:
            raise
        except Exception as error:
            pipe.send(error)
            pipe.recv()  # until it is read


@contextlib.contextmanager
def started(builders: dict[str, tuple]) -> Iterator[dict[str, Side]]:
    """The sides, by name, from `build` and its arguments; they are stopped in the end."""
    sides = {name: Side(*how) for name, how in builders.items()}
    try:
        yield sides
    finally:
        for side in sides.values():
            side.stop()


@contextlib.contextmanager
def environment(threads: int, variables: dict[str, str] | None = None) -> Iterator[None]:
    """For processes that are started within: `threads`, which leave the cores to others while they
    wait, and other variables.
    """
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    os.environ.update(variables or {})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
