"""What a run prints: whatever the console is, and whether or not anybody reads on."""

import os
import sys


def any_console() -> None:
    """Let characters that a console does not know be printed as escapes, not end the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print a line. Where the reader has gone (`| head`) the run goes on in silence."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more at its end: into nothing.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)
