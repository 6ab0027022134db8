"""Errors that end a script with one line on stderr: exit code 2 for invalid input, 1 for a failure while running."""

import difflib
import io
import sys


class UserError(Exception):
    """Invalid input; the message says what is wrong and what to type."""

    exit_code = 2


class RunError(Exception):
    """A failure while running; the message says what failed and what is left."""

    exit_code = 1


def run_script(main, interrupted_hint: str = "files written so far are complete"):
    """Run `main`; a UserError, a RunError, Ctrl-C or a lack of memory ends the process with one line, no traceback.

    Args:
        interrupted_hint: printed after Ctrl-C: what is left and how to resume. If the KeyboardInterrupt has a text,
            that text is printed instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a class name that it cannot show must not end the run
    try:
        main()
    except (UserError, RunError) as error:
        sys.exit(_print_error(error, error.exit_code))
    except KeyboardInterrupt as interrupt:
        sys.exit(_print_error(f"stopped; {str(interrupt) or interrupted_hint}", 130))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sys.exit(_print_error("out of memory; try a lower --batch_size, smaller images, or another --device", 1))


def did_you_mean(word: str, known) -> str:
    """Return "; did you mean X?" with the known name closest to a misspelled one, or "" if none is close."""
    names = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), names, 1)
    return f"; did you mean {names[matches[0]]}?" if matches else ""


def _is_out_of_memory(error):
    """Python raises MemoryError; CUDA and the CPU allocator raise a RuntimeError, each with its own text."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in message or "allocate memory" in message


def _print_error(message, exit_code):
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return exit_code
