"""Runs that are killed at random, and runs under torchrun that are stopped in every way; by hand,
since it takes an hour:

    python tests/stops.py 60          # so many kills of one process, over all scripts
    python tests/stops.py 24 2        # the same with two ranks: one of them is killed, or both
    python tests/stops.py torchrun    # signals, a rank that fails, restarts, a full disk: two ranks
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ranks
import tiny
import torch
from test_stop import after_row, child, play, same, state

import common.record as record_py

FOLDER = tiny.ROOT / "out/stops"
FLAGS = ["--steps", 8, "--eval-every", 3]


def parts():
    if not (FOLDER / "tiny").exists():
        (FOLDER / "tiny").mkdir(parents=True)
        tiny.make(FOLDER / "tiny")
    return ranks.photos_of(FOLDER / "tiny")


def begin(folder, out, name, world, *flags):
    """A script's main in `world` processes, which are ranks if there are two. -> processes"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank):
        if world > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        play(folder, out, name, *flags)
    return [child(lambda rank=rank: run(rank), FOLDER / f"said{rank}") for rank in range(world)]


def kills(n, world=1):
    folder, rng, wrong, took = parts(), random.Random(time.time()), 0, {}
    for i in range(n):
        name = [*ranks.MAINS][i % len(ranks.MAINS)]
        whole, out = FOLDER / f"whole{world}" / name, FOLDER / f"run{world}-{i}"
        if name not in took:
            shutil.rmtree(whole, ignore_errors=True)
            began = time.time()
            [process.join() for process in begin(folder, whole, name, world)]
            took[name] = time.time() - began
        shutil.rmtree(out, ignore_errors=True)
        processes, began = begin(folder, out, name, world, "--resume", "auto"), time.time()
        time.sleep(rng.uniform(0.1, took[name]))
        victims = rng.choice([processes[:1], processes[-1:], processes])
        for process in victims:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(1)
        for process in processes:                            # as torchrun does
            process.terminate()
        codes = [process.join() or process.exitcode for process in processes]
        rows = record_py.read_log(out) if (out / "log.jsonl").exists() else []
        [process.join() for process in begin(folder, out, name, world, "--resume", "auto")]
        equal = all(map(same, state(out), state(whole)))
        wrong += not equal
        print(f"{i + 1:3} {name:10} killed with {len(rows)} rows, exit codes {codes}, "
              f"{'equal' if equal else 'DIFFERENT'}, {time.time() - began:.0f} s", flush=True)
    print(f"{n} kills, {wrong} runs that differ from the uninterrupted one")


class Job:
    """grpo.py's main on the tiny model under torchrun, two ranks, in a session of its own."""

    def __init__(self, out, *flags, options=(), env=()):
        self.out, self.said = out, open(f"{out}.said", "w")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2,
                   "--standalone", *options, tiny.__file__, FOLDER / "tiny", out, *FLAGS, *flags]
        self.agent = subprocess.Popen(
            list(map(str, command)), cwd=tiny.ROOT, stdout=self.said, stderr=self.said,
            start_new_session=True, env=os.environ | dict(OMP_NUM_THREADS="1") | dict(env))
        self.is_alive = lambda: self.agent.poll() is None        # for after_row

    def ranks(self):
        """-> pids of rank 0 and 1"""
        found = subprocess.run(["pgrep", "-P", str(self.agent.pid)], capture_output=True, text=True)
        return sorted(map(int, found.stdout.split()))

    def end(self):
        began = time.time()
        code = self.agent.wait(300)
        left = subprocess.run(["pgrep", "-g", str(self.agent.pid)], capture_output=True, text=True)
        assert not left.stdout.split(), "processes are left"
        return code, time.time() - began

    def text(self):
        return Path(f"{self.out}.said").read_text()


def scenario(name, do, *flags, **more):
    """do(job) to a run; then --resume auto gives what an uninterrupted one gives."""
    out = FOLDER / "torchrun" / name
    job = Job(out, *flags, **more)
    after_row(out, 2, job)
    do(job)
    code, seconds = job.end()
    saved = torch.load(out / "ckpt/optim.pt", weights_only=True)["step"] if (
        out / "ckpt/optim.pt").exists() else 0
    last = [line for line in job.text().splitlines() if line.startswith(("stopped by", "error:"))]
    code_again = Job(out, "--resume", "auto").end()[0]
    (a, rows, _), (b, wanted, _) = state(out), state(FOLDER / "torchrun/whole")
    equal = same(a, b) and len(rows) == len(wanted)
    print(f"{name:24} exit {code}, {seconds:4.1f} s, saved {saved} of {len(rows) - 1}, resumed "
          f"{code_again}, {'equal' if equal else 'DIFFERENT'}; {last[-1:]}", flush=True)


def send(which, to, times=1):
    def do(job):
        for _ in range(times):
            pids = dict(agent=[job.agent.pid], rank0=job.ranks()[:1], rank1=job.ranks()[1:2],
                        all=[job.agent.pid, *job.ranks()])
            for pid in pids.get(to, ()):
                os.kill(pid, which)
            if to == "group":
                os.killpg(job.agent.pid, which)
            time.sleep(0.3)
    return do


def under_torchrun():
    parts()
    shutil.rmtree(FOLDER / "torchrun", ignore_errors=True)
    (FOLDER / "torchrun").mkdir()
    Job(FOLDER / "torchrun/whole", "--resume", "auto").end()
    for to in ("agent", "group", "rank0", "rank1", "all"):
        for which in (signal.SIGTERM, signal.SIGINT):
            scenario(f"{which.name}-{to}", send(which, to))
    for which in (signal.SIGTERM, signal.SIGINT):
        scenario(f"{which.name}-group-twice", send(which, "group", 2))
        scenario(f"{which.name}-all-thrice", send(which, "all", 3))
    for to in ("rank0", "rank1", "group"):
        scenario(f"SIGKILL-{to}", send(signal.SIGKILL, to))
    scenario("SIGKILL-rank1-restarted", send(signal.SIGKILL, "rank1"), "--resume", "auto",
             options=["--max-restarts", 1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    under_torchrun() if sys.argv[1] == "torchrun" else kills(*map(int, sys.argv[1:]))
