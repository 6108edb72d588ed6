"""All five training scripts on the tiny model; not a test by itself:

    torchrun --nproc-per-node 2 tests/ranks.py TINY OUT                # all of them
    torchrun --nproc-per-node 2 tests/ranks.py TINY OUT sft --shard    # one, with flags

OUT/<script>/rank<r>.safetensors is what a rank's model holds in the end, if all were run."""

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_cli import folder_of, photo
from tqdm import tqdm

import common.run as run_py
import common.weights as weights_py
import cycle_edit
import grpo
import pretrain
import reflect
import sft
from common.record import read_log
from labs import edit_reward
from rewards import scored

FORK = multiprocessing.get_context("fork")
LIMIT = 600                                              # seconds of a child; the slowest takes 60
THREE = "--steps 3 --eval-every 3".split()
FLOW = [*THREE, "--batch", 4]
MAINS = {          # --init "": the bridge is drawn, not loaded
    "pretrain": (pretrain.main, lambda f: [*FLOW, "--init", "", "--data", f / "photos"]),
    "sft": (sft.main, lambda f: [*FLOW, "--init", "", "--data", f / "photos"]),
    "edit_reward": (edit_reward.main, lambda f: [*FLOW, "--vlm", "data/shapes/vlm"]),
    "grpo": (grpo.main, lambda f: [*THREE, "--init", "", "--train", "both"]),
    "cycle_edit": (cycle_edit.main, lambda f: [*THREE, "--init", "", "--train", "both"]),
    "reflect": (reflect.main, lambda f: [*THREE, "--init", "", "--lr", 1e-3]),
}


def child(run, said):
    """run() in a process of its own, which writes to the file `said` -> the process. One that hangs
    ends after LIMIT seconds, and `said` has where."""
    def do():
        os.setpgrp()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)           # Linux: it ends with who started it
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(handle, stream)
        sys.stdout = sys.stderr = open(handle, "w", buffering=1)
        faulthandler.register(signal.SIGALRM, file=handle, chain=True)
        signal.alarm(LIMIT)
        torch.set_num_threads(1)                             # its pool anew, before threads race
        tqdm.set_lock(threading.RLock())     # its own, not all processes': it may be killed with it
        code = 1
        try:
            run()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
            print("" if isinstance(e.code, int) else e.code)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)                                   # nothing of pytest's own runs
    process = FORK.Process(target=do)
    process.start()
    return process


def together(world, run, said, near=0):
    """run() in so many ranks, children that find each other as torchrun's do, in a tenth of its
    time. said: a folder for what they write. near: of these so many are on one node, 0: all."""
    said.mkdir(parents=True, exist_ok=True)
    # They meet here, as in torchrun's agent: a port found free may be another's a second later.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def as_rank(rank):
        os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank % (near or world)}",
                          WORLD_SIZE=f"{world}", LOCAL_WORLD_SIZE=f"{near or world}",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{store.port}",
                          TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
                          OMP_NUM_THREADS="1")
        run()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()    # os._exit leaves nothing to atexit
    files = [said / f"{rank}.txt" for rank in range(world)]
    ranks = [child(lambda rank=rank: as_rank(rank), file) for rank, file in enumerate(files)]
    running, failed = ranks, []
    while running and not failed:
        wait([process.sentinel for process in running])
        running = [process for process in ranks if process.exitcode is None]
        failed = [file for process, file in zip(ranks, files) if process.exitcode]
    for process in running:                                  # as torchrun: they wait for who failed
        process.kill()
    assert not failed, failed[0].read_text()[-3000:]


def rows(out, run, world=2, near=0):
    """run() in two ranks, or `world` -> rows of the log in `out`. near: see together"""
    together(world, run, out.with_name(f"{out.name} said"), near)
    return read_log(out)


def photos_of(parts):
    """The tiny model's folder, with pictures to learn from in photos/ -> it"""
    folder = parts / "photos"
    if not folder.exists():
        folder.mkdir()
        names = [f"{i}.png" for i in range(6)]
        for i, name in enumerate(names):
            photo(folder / name, 64, 64, i)
        folder_of(folder, names)
    return parts


def play(folder, out, name, *flags):
    main, own = MAINS[name]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(scored, "HELD_OUT", 8)
        return tiny.play(folder, out, *own(folder), *flags, main=main)


def main(folder, out):
    rank, _, _ = run_py.setup()
    torch.manual_seed(rank)                        # as different as two processes may be
    built, start = [], run_py.same_start

    def remember(m):
        built.append(m)
        return start(m)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(weights_py, "same_start", remember)   # start_model's
        m.setattr(edit_reward, "same_start", remember)
        for name in MAINS:
            play(folder, out / name, name)
            save_file({k: p.detach().clone() for k, p in built[-1].named_parameters()},
                      out / name / f"rank{rank}.safetensors")


if __name__ == "__main__":
    folder, out, *one = sys.argv[1:]
    if one:
        play(Path(folder), Path(out), *one)
    else:
        main(Path(folder), Path(out))
