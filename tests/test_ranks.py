"""Ranks that hold one model, and updates that are not finite: every training script."""

import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_cli import complaint

import common.presets as presets_py
import common.rl as rl_py
import common.run as run_py
import common.weights as weights_py
import model as ours
from common.checkpoint import Ema
from common.run import Finite, check_ranks, key, keyed, same_start, sum_grads
from common.stop import end
from common.weights import learn, swapped
from model import Unified

NAMES = list(ranks.MAINS)


@pytest.fixture(scope="module")
def photos(parts):
    return ranks.photos_of(parts)


# --- one model on all ranks ---


@pytest.fixture(scope="module")
def two(photos, tmp_path_factory):
    """Folders of two runs of one command, each with two processes: torchrun's, and our own."""
    outs = [tmp_path_factory.mktemp("ranks") for _ in range(2)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         ranks.__file__, photos, outs[0]], capture_output=True, text=True, cwd=tiny.ROOT,
        env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    ranks.together(2, lambda: ranks.main(photos, outs[1]), tmp_path_factory.mktemp("said"))
    return outs


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_hold_one_model(two, name):
    """Bit for bit after three updates, though torch's own generator differed between the ranks."""
    a, b = (load_file(two[0] / name / f"rank{r}.safetensors") for r in (0, 1))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any("bridge" in k or "head" in k for k in a)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_of_one_command_give_equal_files(two, name):
    files = [sorted(f.relative_to(out) for f in (out / name).rglob("*")
                    if f.suffix in (".safetensors", ".pt", ".png") and f.name != "curves.png")
             for out in two]
    assert files[0] == files[1] and len(files[0]) >= 4
    for file in files[0]:
        a, b = (out / file for out in two)
        assert a.read_bytes() == b.read_bytes(), file


@pytest.mark.parametrize("name", NAMES)
def test_one_process_gives_the_rows_of_two(two, photos, tmp_path, name):
    """So a run may go on with another number of ranks: each sample's noise comes from its number
    among all ranks'."""
    rows = ranks.play(photos, tmp_path / "one", name)
    wanted = [json.loads(line) for line in open(two[0] / name / "log.jsonl")]
    columns = [k for k in rows[-1] if k == "loss" or k.endswith("grad_norm") or k.startswith("rew")]
    assert len(columns) >= 2 and len(rows) == len(wanted)
    for row, want in zip(rows, wanted):
        assert {k: row[k] for k in columns if k in row} == pytest.approx(
            {k: want[k] for k in columns if k in want}, rel=1e-3)


def test_a_fresh_bridge_comes_from_the_seed(parts):
    """Whatever torch's own generator has been used for; another seed, another bridge."""
    with pytest.MonkeyPatch.context() as m:
        m.setitem(presets_py.PRESETS, "shapes", tiny.build(ranks_config(parts)).cfg)
        built = []
        for used, seed in ((0, 5), (1, 5), (1, 6)):
            torch.manual_seed(used)
            built.append(Unified.from_preset("shapes", seed=seed).bridge.meta_queries)
    assert torch.equal(built[0], built[1]) and not torch.equal(built[0], built[2])


def ranks_config(parts):
    return presets_py.Config(**json.loads((parts / "config.json").read_text()))


def parted(out):
    """Two processes: what begins apart is made one; what parts later ends both in one line."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    module = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(module.weight, float(rank))
    same_start(module)
    said = [f"{module.weight.sum().item():g}"]
    for spoil in (lambda p: p[0, 0].mul_(2) if rank else p[0, 0].add_(0),
                  lambda p: p[0, 0].fill_(float("nan")) if rank else p):
        torch.nn.init.constant_(module.weight, 0.5)
        with torch.no_grad():
            spoil(module.weight)
        try:
            check_ranks(dict(module.named_parameters()), "after update 7")
            said.append("went on")
        except SystemExit as e:
            said.append(str(e))
    (out / str(rank)).write_text("\n".join(said))


@pytest.mark.parametrize("how, code", [
    (lambda: run_py.fail("x"), 1), (lambda: end(15, "x"), 143),
    (lambda: sys.excepthook(ValueError, ValueError(), None), 1), (lambda: None, 0)])
def test_who_fails_waits_for_nobody(tmp_path, how, code):
    """NCCL's destroy waits for collectives that others have begun, and torchrun for the process."""
    def work():
        run_py.setup()
        run_py.codes.clear()                             # pytest's own
        with suppress(SystemExit):
            how()
        with pytest.MonkeyPatch.context() as m:
            m.setattr(dist, "destroy_process_group", lambda: said.write_text("0"))
            m.setattr(os, "_exit", lambda code: said.write_text(str(code)) and sys.exit())
            with suppress(SystemExit):
                run_py.leave()
    said = tmp_path / "left"
    ranks.together(1, work, tmp_path / "said")
    assert said.read_text() == str(code)


def test_who_fails_before_they_meet_ends_the_others(tmp_path):
    """As under torchrun: or a test would wait an hour for who is gone, and not say why."""
    def work():
        if os.environ["RANK"] == "1":
            raise ValueError("not today")
        dist.init_process_group("gloo")
    with pytest.raises(AssertionError, match="ValueError: not today"):
        ranks.together(2, work, tmp_path / "said")


def test_ranks_that_part_stop_in_one_line(tmp_path):
    ranks.together(2, lambda: parted(tmp_path), tmp_path / "said")
    a, b = ((tmp_path / str(r)).read_text().splitlines() for r in (0, 1))
    assert a == b and a[0] == "0"                                # rank 0's weights, on both
    assert "ranks hold different weights after update 7, first weight" in a[1]
    assert "not finite after update 7, first weight" in a[2] and len(a) == 3


# --- updates that are not finite ---


def weights(out):
    return load_file(out / "ckpt/model.safetensors")


def play(photos, out, name, *flags, **patches):
    script = sys.modules[ranks.MAINS[name][0].__module__]
    home = run_py if hasattr(script, "descend") else rl_py               # of RL: see Optimiser
    with pytest.MonkeyPatch.context() as m:
        for where, value in patches.items():
            m.setattr(home if where == "sum_grads" else torch.optim.AdamW, where, value)
        return ranks.play(photos, out, name, *flags)


def at_call(n, real, before):
    """real, but before its n-th call `before` is called with its inputs, which may replace it"""
    calls = iter(range(1000))

    def wrapped(*inputs, **more):
        if next(calls) == n and before(*inputs) is not None:
            return None
        return real(*inputs, **more)
    return wrapped


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_leaves_one_update_out(photos, tmp_path, name, capsys):
    """A NaN in one gradient, of one parameter: as if that update had not been. It is counted, and
    named with its step and prompts."""
    def spoil(params, watched=()):
        one = next(p for p in reversed(params) if p.grad is not None)
        one.grad.view(-1)[0] = float("nan")
    hurt = play(photos, tmp_path / "hurt", name, sum_grads=at_call(1, sum_grads, spoil))
    said = capsys.readouterr().err
    step = torch.optim.AdamW.step
    play(photos, tmp_path / "without", name, step=at_call(1, step, lambda opt: True))
    a, b = weights(tmp_path / "hurt"), weights(tmp_path / "without")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(p.isfinite().all() for p in a.values())
    rows = [r for r in hurt if r["step"]]
    assert [r.get("skipped") for r in rows] == [None, 1, None]
    assert "update 2 is skipped: its gradient norm is nan; prompts of rank 0: '" in said


def test_a_loss_or_ratio_that_is_not_finite_spoils_its_update():
    """Also where the gradient itself stays finite."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        p = torch.nn.Parameter(torch.ones(2))
        p.sum().backward()
        sum_grads([p], [torch.tensor([1.0, bad])])
        assert p.grad.isnan().all()
    p.grad = torch.ones(2)
    sum_grads([p], [torch.tensor(3.0)])
    assert torch.equal(p.grad, torch.ones(2))


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_nothing_but_nan_ends_the_run(photos, tmp_path, name):
    """Past five in a row, in one line; the last checkpoint stays as it was."""
    good = 2

    def ruin(params, watched=()):
        params[0].grad.fill_(float("nan"))
    calls = iter(range(100))

    def spoiled(params, watched=()):
        if next(calls) >= good:
            ruin(params)
        return sum_grads(params, watched)
    said = complaint(lambda: play(photos, tmp_path / "run", name, "--steps", 20, "--eval-every",
                                  good, sum_grads=spoiled))
    assert f"{Finite.MOST + 1} updates in a row were not finite" in said
    saved = torch.load(tmp_path / "run/ckpt/optim.pt", weights_only=True)
    assert saved["step"] < good + Finite.MOST + 1
    assert all(p.isfinite().all() for p in weights(tmp_path / "run").values())


def test_borrowed_weights_come_back_after_an_exception(parts):
    m = learn(tiny.build(ranks_config(parts), init=parts / "sft"),
              {"dit": weights_py.adapter("dit", 2, 2)})
    params = {k: p for k, p in m.named_parameters() if p.requires_grad}
    ema = Ema(params, 0.9)
    for mean in ema.mean.values():
        mean.add_(1)
    before = {k: p.clone() for k, p in params.items()}
    own = m.dit, m.bridge, m.vlm
    for borrowed in (ema.applied(), swapped(m, (torch.nn.Identity(),)),
                     weights_py.adapters_off(m)):
        with pytest.raises(KeyboardInterrupt), borrowed:
            raise KeyboardInterrupt
    assert (m.dit, m.bridge, m.vlm) == own
    assert all(torch.equal(before[k], p) for k, p in params.items())
    loras = [x for x in m.modules() if isinstance(x, ours.LoraLayer)]
    assert loras and not any(x.disable_adapters for x in loras)


# --- seeds ---


def test_any_seed_works_and_small_ones_keep_their_noise(photos, tmp_path):
    """A date as a seed, too; what older runs drew with seeds that worked is drawn again."""
    assert key(3, 7, 5) == (3 * 1_000_003 + 7) * 1_000_003 + 5
    assert key(18_446_000, 0, 0) == 18_446_000 * 1_000_003**2    # the last that used to work
    seeds = (0, 1, 20_250_525, 2**40, 2**63 - 1)
    drawn = [torch.randn(4, generator=keyed(key(s, 0, 0))) for s in seeds]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    for k in (key(0, 0, 7), 2**64 - 1, 2**64, -1):
        assert torch.equal(torch.randn(2, generator=keyed(k)),
                           torch.randn(2, generator=torch.Generator().manual_seed(k % 2**64)))
    for name in NAMES:
        rows = play(photos, tmp_path / name, name, "--steps", 1, "--seed", 2**63 - 1)
        assert rows[-1]["step"] == 1
