"""How a process is stopped from outside: by a signal, or because another rank has ended."""

import os
import signal
import sys
import threading

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

SIGNALS = (signal.SIGTERM, signal.SIGINT)
stopping = threading.Event()          # a signal has asked the run to stop after this update
received = []                         # such signals, in their order
codes = []                            # exit codes of what ends this process before its time


def this_rank():
    """-> this process's number among those of torchrun, 0 without it"""
    return int(os.environ.get("RANK", 0))


def heed(how):
    """how: as_a_wish or at_once"""
    for which in SIGNALS:
        signal.signal(which, how)


def as_a_wish(which, frame):
    """While an update is in hand: it is finished and the run is saved, however many more follow.
    torchrun passes on what it gets, so that a rank may well get two."""
    received.append(which)
    if not stopping.is_set() and this_rank() == 0:
        print(f"\n{signal.Signals(which).name}: this update is finished, then the run is saved",
              file=sys.stderr)
    stopping.set()


def at_once(which, frame):
    """While nothing can be lost: before the first update, and in a benchmark at the end."""
    end(which, "at once; what was saved is whole")


def end(which, what):
    """Ends the process with a signal's exit code and one line."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)              # of more: Python is on its way out
    codes.append(128 + which)
    if this_rank() == 0:
        print(f"\nstopped by {signal.Signals(which).name} {what}", file=sys.stderr)
    sys.exit(128 + which)


def fail(message):
    """A user's error: one line, non-zero exit, nothing written. torchrun ends the other ranks, and
    repeats the line."""
    codes.append(1)
    try:
        sys.exit("error: " + str(message).replace("\n", " "))
    except SystemExit as e:
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            ErrorHandler().record_exception(e)
        raise


def quietly(kind, error, trace, show=sys.excepthook):
    """In place of a traceback: who waits for a rank that has ended has nothing to add."""
    codes.append(1)
    left_alone = kind.__name__ in ("RuntimeError", "DistBackendError") and "peer" in str(error)
    if not left_alone:
        show(kind, error, trace)
