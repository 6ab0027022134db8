"""Deal the runs of a comparison out to several processes, on one machine or on several with a shared folder."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from utils.errors import UserError


@contextmanager
def lock(path: str, wait: bool = False) -> Iterator[bool]:
    """Whether this process got the lock file at `path` (`wait`: once it is free); held for the body, freed if it dies.

    Raises:
        UserError: the folder takes no lock files.
    """
    import fcntl  # not on Windows, where a comparison runs in one process

    with ExitStack() as stack:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            fcntl.flock(stack.enter_context(open(path, "w")), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_mine = True
        except BlockingIOError:
            is_mine = False
        except OSError as error:
            raise UserError(f"cannot lock {path}: {error.strerror or error}") from None
        yield is_mine


def deal_out(folder: str, names: Iterable[str], process_count: int, pause: float = 1.0) -> Iterator[str]:
    """Yield every name once; with several processes, not while another one has it.

    A process has a name until it asks for the next one. So it gets names that nobody had, names that others are done
    with, and those of processes that died.

    Args:
        folder: for the lock files of several processes.
        pause: seconds between two looks at the names that other processes have.
    """
    if process_count == 1:
        yield from names
        return
    pending = list(names)
    while pending:
        for name in list(pending):
            with lock(os.path.join(folder, f".{os.path.basename(name)}.lock")) as is_mine:
                if is_mine:
                    pending.remove(name)
                    yield name
        if pending:
            time.sleep(pause)
