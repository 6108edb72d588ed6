"""What only a GPU can show, in one command: at most eight minutes on one card of 80 GB.

    python tests/gpu.py                  # a line for each check, and out/gpu.json
    python tests/gpu.py --only 3,7       # some of them
    python tests/gpu.py --plan           # the table of docs/gpus.md: computed, without a GPU

Models have the papers' shapes and random weights, so that nothing is downloaded. Each check is a
process of its own with a limit of time; its words are in out/gpu/. PASS, FAIL, or SKIP where this
machine cannot tell: without a GPU every check runs, on models of a few thousand weights, but most
of their figures mean nothing there. Exit code 1 if one failed. No GPU has run it yet.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")      # to ask for a GPU starts nothing
import tiny  # noqa: E402, F401  (it finds the repository)
import checks  # noqa: E402
import torch  # noqa: E402
from apart import Apart, Lost  # noqa: E402
from checks import CHECKS, TARGETS, Verdict  # noqa: E402


def find():
    """-> this machine, and how to start a process that may use its GPU: fork, unless that fails"""
    for method in ("fork", "spawn"):
        try:
            m = Apart(checks.probe, method=method).answer(120)
        except Lost as e:
            print(f"by {method} no process can use the GPU: {e}")
            continue
        if m.device == "cuda" or not shutil.which("nvidia-smi"):
            break
    return m, method


def run(m, check, folder, limit):
    """A check, in its process -> Verdict"""
    if check is not checks.run_tests:    # the tests bring their own models
        checks.prepare(m, folder)
    return check(m, folder, limit)


def status(verdict):
    return {True: "PASS", False: "FAIL", None: "SKIP"}[verdict.passed]


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="numbers of checks, such as 3,7")
    p.add_argument("--minutes", type=float, default=8, help="for all of them")
    p.add_argument("--out", default="out/gpu", help="folder; the table goes to OUT.json")
    p.add_argument("--plan", nargs="?", const="all", help="compute docs/gpus.md's table")
    p.add_argument("--one-rank", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one_rank:
        return checks.one_rank(*a.one_rank)
    if a.plan:
        import plans
        return plans.main(a.plan)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))        # so that what runs is ended, too
    m, method = find()
    begin, out = time.time(), Path(a.out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    said = dict(machine=asdict(m), torch=torch.__version__, checks=[])
    print(f"{m.name}, {m.memory:.0f} GiB, {m.peak:g} TFLOP/s at most; torch {torch.__version__}"
          if m.device == "cuda" else "no GPU: every check runs small, on the CPU; what that cannot "
          f"tell is a SKIP; torch {torch.__version__}")
    figures, chosen = {}, [int(n) for n in a.only.split(",") if n]

    def tell(number, name, verdict, seconds):
        print(f"{number:2} {status(verdict)} {name} ({seconds:.0f} s): {verdict.said}", flush=True)
        said["checks"].append(dict(number=number, name=name, status=status(verdict),
                                   seconds=round(seconds, 1), **asdict(verdict)))
        out.with_name(out.name + ".json").write_text(json.dumps(said, indent=1))
    for number, (name, check, limit) in enumerate(CHECKS, 1):
        if chosen and number not in chosen:
            continue
        started, left = time.time(), 60 * a.minutes - (time.time() - begin)
        limit, verdict = min(left, limit * m.big(1, 6)), Verdict(False, "no time was left for it")
        if limit > 10:
            with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
                job = Apart(run, m, check, Path(folder), limit, log=out / f"{name}.txt",
                            method=method)
                try:
                    verdict = job.answer(limit)
                    figures[name] = verdict.figures
                except Lost as e:
                    verdict = Verdict(False, str(e))
        tell(number, name, verdict, time.time() - started)
    for number, (name, target) in enumerate(TARGETS, len(CHECKS) + 1):
        if not chosen or number in chosen:
            try:
                verdict = target(m, figures)
            except KeyError as e:
                verdict = Verdict(False, f"not measured: {e} gave no figures")
            tell(number, name, verdict, 0)
    return int(any(its["passed"] is False for its in said["checks"]))


if __name__ == "__main__":
    sys.exit(main())
