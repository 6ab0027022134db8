"""Errors that end a run with one line: exit code 2 for what the user gave, 1 for what failed underway."""

import difflib
import sys


class UserError(Exception):
    """Something the user gave cannot be used; the message names it and the way out."""

    exit_code = 2


class RunError(Exception):
    """Something failed while running; the message says what, and what is left."""

    exit_code = 1


def run_script(main, stopped: str = "files written so far are whole"):
    """Call `main` and leave with its exit code, telling an error of the kinds above in one line on stderr.

    Args:
        stopped: what to say when the user interrupts it: what is left, and how to go on; a KeyboardInterrupt that says
            it itself goes before.
    """
    try:
        main()
    except (UserError, RunError) as error:
        sys.exit(_told(error, error.exit_code))
    except KeyboardInterrupt as interrupt:
        sys.exit(_told(f"stopped; {str(interrupt) or stopped}", 130))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sys.exit(_told("out of memory; lower --batch_size", 1))


def nearest(word: str, known) -> str:
    """ "; did you mean X?" with the known name that is closest to a wrong one, or nothing."""
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), names, 1)
    return f"; did you mean {names[found[0]]}?" if found else ""


def _is_out_of_memory(error):
    """Python, CUDA and the CPU's allocator each have their own words for it."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in told or "allocate memory" in told


def _told(message, exit_code):
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return exit_code
