"""Work in processes of their own, forked from this one, so that nothing is imported again. What
crashes, hangs or takes the memory there does not do so here.
"""

import atexit
import ctypes
import os
import signal
import sys
import time
import traceback
from multiprocessing import get_context


class Lost(Exception):
    """A process gave no answer; says why."""


class Enough(Exception):
    """Raised in a run that has shown enough, before it saves."""


class Apart:
    """work(*given) in a process of its own, with `env` in its environment. log: a file for what it
    says; empty: where this one says it. method: fork, or spawn, which imports all again."""

    def __init__(self, work, *given, log="", method="fork", **env):
        context = get_context(method)
        self.mine, its = context.Pipe(duplex=False)
        self.process = context.Process(target=answer, args=(its, str(log), env, work, given))
        self.process.start()
        its.close()

    def answer(self, limit, leave=60):
        """-> what work returned, or Lost: after `limit` seconds, or `leave` more to exit in"""
        try:
            if not self.mine.poll(limit):
                raise Lost(f"no answer within {limit:.0f} s")
            error, value = self.mine.recv()
            self.process.join(leave)
            if self.process.exitcode is None:
                raise Lost(f"its process did not end within {leave} s of its answer")
        except EOFError:
            self.process.join()
            raise Lost(f"its process died (exit code {self.process.exitcode})")
        finally:
            self.stop()
        if error:
            raise Lost(error)
        return value

    def stop(self):
        """Ends the process, and those that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:                       # it has ended, or not begun
            self.process.kill()
        self.process.join()


def answer(pipe, log, env, work, given):
    """The process: (an error in one line, None) or ("", what work returned) goes into the pipe."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)           # Linux: it ends with who started it
    atexit._clear()                                      # the parent's, such as its folders' ends
    os.environ.update(env)
    if log:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    said = "", None
    try:
        said = "", work(*given)
    except BaseException as e:                           # SystemExit, too: the scripts' fail()
        traceback.print_exc()
        said = f"{type(e).__name__}: {' '.join(str(e).split())}"[:300], None
    pipe.send(said)
    pipe.close()
    atexit._run_exitfuncs()                              # as at the end of a program
    sys.stdout.flush()


def held():
    """-> bytes that this process holds, and the most that it held"""
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
    return tuple(int(lines[k].split()[0]) * 1024 for k in ("VmRSS", "VmHWM"))


def metered(work, *given):
    """-> what work(*given) returns, processor seconds, bytes by which the process grew at most"""
    before, begin = held()[0], time.process_time()
    value = work(*given)
    return value, time.process_time() - begin, held()[1] - before
