"""Errors that end a run with one line: exit code 2 for what the user gave, 1 for what failed underway."""

import sys


class UserError(Exception):
    """Something the user gave cannot be used; the message names it and the way out."""

    exit_code = 2


class RunError(Exception):
    """Something failed while running; the message says what, and what is left."""

    exit_code = 1


def run_script(main):
    """Call `main` and leave with its exit code, telling the errors above in one line on stderr."""
    try:
        main()
    except (UserError, RunError) as error:
        sys.exit(_told(error, error.exit_code))
    except KeyboardInterrupt:
        sys.exit(_told("stopped; files written so far are whole", 130))


def _told(message, exit_code):
    print(f"error: {message}", file=sys.stderr)
    return exit_code
