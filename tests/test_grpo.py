"""The real grpo.py, on tiny real parts: the ratio starts at 1, and nothing that should not matter
(micro-batches, ranks, flat groups, other prompts, a restart) changes what is learned."""

import copy
import json
import math
from dataclasses import replace

import pytest
import ranks
import tiny
import torch
from safetensors.torch import load_file
from test_cli import complaint, files
from torch.distributions import Normal, kl_divergence
from torch.nn.modules.module import register_module_forward_pre_hook

import common.presets as presets_py
import common.record as record_py
import eval as eval_py
import grpo
from common.rl import Anchor
from grpo import Args, group_advantage, surrogate
from common.checkpoint import Ema
from common.presets import KERNELS, Config
from common.run import key
from common.weights import swapped
from model import Branches, MMDiT, rollout, sde_step, sigmas

PROMPTS = ["a photo of a red circle", "a photo of two blue stars and a green ring", "x"]
G = 4


def config(parts, **changes):
    return replace(Config(**json.loads((parts / "config.json").read_text())), **changes)


@pytest.fixture(scope="module")
def model(parts):
    return tiny.build(config(parts), init=parts / "sft")


def case(model, **changes):
    """The first update's inputs, made as main makes them: (args, guided, [what surrogate takes])"""
    args = replace(Args(T=6, G=G, eta=0.9, guidance=3.0), **changes)
    with torch.no_grad():
        guided = model.guided(model.encode(PROMPTS), args.guidance)
    ts, window = sigmas(args.T).tolist(), range(1, 1 + args.window)
    keys = [(key(0, 0, n // G * 100), key(0, 0, n * 100 + 1)) for n in range(len(PROMPTS) * G)]
    path = rollout(model, guided, ts, window, keys, args.eta, args.kind, args.shared_noise)
    assert path.logp.dtype == path.xs.dtype == torch.float32
    A = torch.randn(len(keys), generator=torch.Generator().manual_seed(0))
    owner = torch.arange(len(keys)) // G
    return args, guided, [owner, path, A, ts, path.logp.numel(), args]


def gradient(model, guided, rest, ref=None):
    """-> largest |ratio - 1| and mean KL, the DiT's gradient as one vector"""
    model.dit.requires_grad_(True)
    model.dit.zero_grad()
    path, args = rest[1], rest[-1]
    anchor = ref and Anchor([ref, model.bridge], guided, args.beta, args.kl)
    ratio, kl = surrogate(model, guided, *rest, anchor).T
    assert len(ratio) == path.logp.numel()                  # a row per image and step
    return ((ratio - 1).abs().max(), kl.mean()), torch.cat(
        [p.grad.flatten() for p in model.dit.parameters() if p.grad is not None]).clone()


def close(a, b, tol=1e-5):
    assert b.norm() > 1e-4, "compares nothing but zeros"
    assert (a - b).norm() <= tol * b.norm(), f"{(a - b).norm() / b.norm():.2g}"


# --- the ratio at the first update ---


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("bf16", [False, True])
def test_first_update_has_ratio_one(model, kind, bf16, monkeypatch):
    monkeypatch.setattr(model, "bf16", bf16)
    limit = Args().clip / 10 if bf16 else 1e-6
    args, guided, rest = case(model, kind=kind)
    some = torch.arange(12) % 3 > 0                     # another batch than the rollout's
    for micro in (0, 5):
        owner, path, A, *tail = rest[:-1] + [replace(args, micro=micro)]
        part = [owner[some], path.rows(some), A[some], *tail]
        assert gradient(model, guided, part)[0][0] <= limit

    # The same test must see a mistake: guidance that differs, log-probs or latents kept in bf16.
    other = model.guided(guided[0][1], 1.5)
    assert gradient(model, other, rest)[0][0] > 10 * limit
    if kind != "cps-simple":         # its log-probs are near 0, where bf16 is fine
        for bad in (dict(logp=path.logp.bfloat16().float()), dict(xs=path.xs.bfloat16().float())):
            assert gradient(model, guided, [owner, replace(path, **bad), *rest[2:]])[0][0] > limit


@pytest.mark.parametrize("bf16", [False, True])
def test_first_update_of_main_has_ratio_one(parts, tmp_path, bf16, capsys):
    """The whole path of a user's run: what log.jsonl says after one update."""
    rows = tiny.play(parts, tmp_path / "run", "--steps", 1, "--guidance", 2, bf16=bf16)
    assert [r["step"] for r in rows] == [0, 1]
    assert rows[1]["ratio_off"] <= (Args().clip / 10 if bf16 else 1e-6)
    assert rows[1]["kept"] == 0.75 and rows[1]["grad_norm"] > 0
    clip = Args().clip
    assert f"--clip {clip} is {clip * 4 * 16 * 16:.3g} nats" in capsys.readouterr().out
    # With one update nothing can be clipped, without --beta there is no KL: no columns of these.
    assert not rows[1].keys() & {"clipped", "ratio_low", "ratio_high", "kl_old", "kl", "sft",
                                 "ldam"}


# --- what must not change the gradient ---


def test_micro_batches_add_up(model):
    args, guided, rest = case(model)
    whole = gradient(model, guided, rest)[1]
    for micro in (1, 7):
        close(gradient(model, guided, rest[:-1] + [replace(args, micro=micro)])[1], whole)


def learned(out):
    """The gradient of a run's only update, out of Adam's first moment, and its norm."""
    state = torch.load(out / "ckpt" / "optim.pt", weights_only=True)["opt"]
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    return torch.cat([s["exp_avg"].flatten() for s in state.values()]), rows[-1].get("grad_norm")


def test_ranks_and_micro_batches_of_main(parts, tmp_path):
    """One process = two processes = many micro-batches, with bridge and null prompt learning;
    one group is flat, so that one rank has half the work of the other."""
    flags = ["--steps", 1, "--train", "both", "--guidance", 2]
    tiny.play(parts, tmp_path / "one", *flags)
    want, norm = learned(tmp_path / "one")
    tiny.play(parts, tmp_path / "micro", *flags, "--micro", 5)
    ranks.rows(tmp_path / "ranks", lambda: tiny.play(parts, tmp_path / "ranks", *flags))
    for run in ("micro", "ranks"):
        got, its_norm = learned(tmp_path / run)
        close(got, want)
        assert its_norm == pytest.approx(norm, rel=1e-5)         # clipping hides a wrong scale
        a, b = ([json.loads(line) for line in open(tmp_path / r / "log.jsonl")][-1]
                for r in ("one", run))
        assert a["reward_blue"] == pytest.approx(b["reward_blue"], abs=1e-6)
        assert a["kept"] == b["kept"] == 0.75


@pytest.mark.parametrize("dealt", [False, True])
def test_two_ranks_give_the_curve_of_one(parts, tmp_path, dealt):
    """Five updates, all that is logged but the time, and what was learned. dealt: rewards by
    category are dealt out at random, so that an image gets others than it was asked for."""
    flags = ["--steps", 5, "--train", "both", "--lr", 1e-3, "--eval-every", 1]
    if dealt:
        file = tmp_path / "mine.py"
        file.write_text("def later(images, rows):\n    return range(len(rows))\n")
        reward = json.dumps({"*": "blue", "color_attr": f"{file}:later"})
        flags += ["--shuffle", "--reward", reward]
    one = tiny.play(parts, tmp_path / "one", *flags)
    two = ranks.rows(tmp_path / "two", lambda: tiny.play(parts, tmp_path / "two", *flags))
    assert len(one) == len(two) == 6 and len({r["grad_norm"] for r in one[1:]}) == 5
    for a, b in zip(one, two):
        for name in a.keys() - {k for k in a if k == "at" or k.startswith("s_")}:
            # One value of a pixel, rounded the other way, is some bytes of a JPEG.
            tol = 2e-3 if name == "kB" else 1e-4
            assert b[name] == pytest.approx(a[name], rel=tol, abs=1e-6), name
    a, b = (load_file(tmp_path / run / "ckpt/model.safetensors") for run in ("one", "two"))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flat", [1, 4])
def test_flat_groups_cost_no_forward(parts, tmp_path, flat):
    prompts = [json.loads(line) | dict(flat=i < flat)
               for i, line in enumerate(open(parts / "prompts.jsonl"))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in prompts))
    forwards = []
    hook = register_module_forward_pre_hook(
        lambda m, a: forwards.append((len(a[0]), torch.is_grad_enabled()))
        if isinstance(m, MMDiT) else None)
    rows = tiny.play(parts, tmp_path / "run", "--steps", 1, "--prompts", tmp_path / "p.jsonl")
    hook.remove()
    assert sum(n for n, grad in forwards if grad) == 3 * G * (4 - flat)      # window x images
    drawn = [n for n, grad in forwards if not grad and n in (4, 16)]         # 6: the evaluation's
    assert drawn == sorted(drawn) and len(drawn) == 6                        # a group is one image
    assert drawn.count(16) >= 4                                              # up to the window
    assert rows[1]["kept"] == 1 - flat / 4
    if flat == 4:
        assert learned(tmp_path / "run")[0].abs().max() == 0 and rows[1]["grad_norm"] == 0


# --- advantages ---


def test_group_advantage():
    g = torch.Generator().manual_seed(0)
    R = torch.randn(12, 2, generator=g) * torch.tensor([1.0, 100.0])
    W = torch.tensor([0.75, 0.25]).expand(12, 2)
    A = group_advantage(R, W, G)
    r = R.view(3, G, 2)
    z = (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(A, (z * W.view(3, G, 2)).sum(2).flatten(), atol=1e-3, rtol=1e-3)
    assert A.view(3, G).mean(1).abs().max() < 1e-6
    scaled = group_advantage(R * torch.tensor([1.0, 1e-2]) + 5, W, G)   # no reward outweighs by
    torch.testing.assert_close(scaled, A, atol=1e-3, rtol=1e-3)         # its spread or offset

    # Not scored is not 0: the others are compared among themselves, and it neither gains nor loses.
    R[1, 0] = R[4:8, 1] = math.nan
    B = group_advantage(R, W * (~R.isnan()), G)
    kept = R[[0, 2, 3], 0]
    z0 = (kept - kept.mean()) / kept.std(correction=0)
    z1 = z[0, :, 1]
    torch.testing.assert_close(B[[0, 2, 3]], 0.75 * z0 + 0.25 * z1[[0, 2, 3]], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(B[1], 0.25 * z1[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(B[4:8], 0.75 * z[1, :, 0], atol=1e-3, rtol=1e-3)
    assert not group_advantage(R * math.nan, W, G).any()


@pytest.mark.parametrize("n", [2, 7, 8, 24])
def test_a_flat_group_has_advantage_exactly_zero(n):
    """Rounding of the mean must not make 1/3 differ from 1/3: the group would not be dropped."""
    R = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)).repeat_interleave(n, 0)
    assert not group_advantage(R, torch.ones_like(R), n).any()


# --- KL ---


def test_kl_is_the_gaussians(model):
    """Both forms against torch.distributions, value and gradient; 0 against itself."""
    args, guided, rest = case(model, beta=0.7, kl="mean")
    owner, path, A, ts, total, _ = rest
    rest[2], xs = torch.zeros_like(A), path.xs             # only the KL is left
    (_, kl), grad = gradient(model, guided, rest, ref=model.dit)
    assert kl == 0 and grad.abs().max() == 0

    ref = copy.deepcopy(model.dit).requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    for p in ref.parameters():
        p += 0.02 * torch.randn(p.shape, generator=g)
    own = model.dit
    for form in ("mean", "velocity"):
        rest[-1] = replace(args, kl=form)
        (_, kl), grad = gradient(model, guided, rest, ref)
        assert model.dit is own                            # the reference was only borrowed
        model.dit.zero_grad()
        want = []
        for k in path.window:
            out = []
            for dit in (own, ref):
                model.dit = dit
                v = model.velocity(xs[k - 1], ts[k], guided.rows(owner))
                _, _, mean, std = sde_step(v, xs[k - 1], ts[k], ts[k + 1], args.eta, x_next=xs[k])
                out.append((v, Normal(mean, std)))
            model.dit = own
            (v, p), (v_ref, q) = out
            want.append(kl_divergence(p, q) if form == "mean" else (v - v_ref) ** 2)
        want = torch.stack(want)                           # (w,N,C,H,W)
        torch.testing.assert_close(kl, want.mean().detach())
        (0.7 * want.mean((2, 3, 4)).sum() / total).backward()
        close(grad, torch.cat([p.grad.flatten() for p in own.parameters() if p.grad is not None]))


# --- conditions, guidance, noise ---


@pytest.mark.parametrize("changes", [
    dict(bridge="scb", keep="all"), dict(bridge="scb", keep="query"),
    dict(bridge="last", keep="all"), dict(bridge="last", keep="query"), dict(bridge="text")],
    ids=lambda c: "-".join(c.values()))
def test_a_condition_does_not_depend_on_other_prompts(parts, changes):
    model = tiny.build(config(parts, **changes))
    tiny.randomise(model.bridge)
    with torch.no_grad():
        alone = [model.encode([p]) for p in PROMPTS]
        for order in ([0, 1, 2], [2, 0], [1]):
            both = model.encode([PROMPTS[i] for i in order])
            for row, i in enumerate(order):
                L = int(alone[i].mask.sum()) if alone[i].mask is not None else alone[i].ctx.shape[1]
                ours = both.ctx[row, :L]
                torch.testing.assert_close(ours, alone[i].ctx[0, :L], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(both.pooled[row], alone[i].pooled[0], atol=1e-5,
                                           rtol=1e-5)
                if both.mask is not None:
                    assert int(both.mask[row].sum()) == L
        if changes.get("keep") == "query":
            assert alone[0].ctx.shape[1] == model.cfg.n_query and both.mask is None
    assert (alone[0].ctx[0, -1] - alone[1].ctx[0, -1]).abs().max() > 1e-2   # the prompt matters
    assert (alone[0].pooled - alone[1].pooled).abs().max() > 1e-3


def test_queries_and_connector_get_gradient(parts):
    model = tiny.build(config(parts))
    tiny.randomise(model.bridge)
    model.bridge.requires_grad_(True)
    c = model.encode(PROMPTS)
    (c.ctx[c.mask].square().sum() + c.pooled.square().sum()).backward()
    assert all(p.grad.abs().max() > 0 for p in model.bridge.parameters())
    assert all(p.grad is None for p in model.vlm.parameters())


def test_guidance_is_a_weighted_sum(model):
    with torch.no_grad():
        cond = model.encode(PROMPTS)
        assert len(model.guided(cond, 1)) == 1             # no guidance: half the forwards
        branches = model.guided(cond, 3.5)
        assert [w for w, _ in branches] == [3.5, -2.5]
        x = model.noise([1, 2, 3])
        v = model.velocity(x, 0.6, branches)
        real, null = (model.velocity(x, 0.6, [(1.0, c)]) for c in (cond, model.null(3)))
        torch.testing.assert_close(v, null + 3.5 * (real - null), atol=1e-5, rtol=1e-5)
        assert (v - real).abs().max() > 0.1


def agree(a, b):
    assert a.window == b.window
    for x, y in ((a.x0, b.x0), (a.xs, b.xs), (a.logp, b.logp)):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_an_image_depends_on_its_key_alone(model):
    """Whatever batch it is drawn in, by sampling or by rollout."""
    with torch.no_grad():
        cond = model.encode([PROMPTS[0]]).repeat(4)
        keys, ts = [(10, 101), (10, 102), (11, 103), (11, 104)], sigmas(6).tolist()
        window = range(1, 3)
        four = Branches([(1.0, cond)])
        path = rollout(model, four, ts, window, keys, 0.9, shared=True)
        for k in range(4):
            one = rollout(model, four.rows([k]), ts, window, keys[k : k + 1], 0.9, shared=True)
            agree(one, path.rows([k]))
        pair = rollout(model, four.rows([0, 2]), ts, window, keys, 0.9, shared=True)
        agree(pair, path)                                  # drawn once until the window
        start, x0, xs = model.noise([a for a, _ in keys]), path.x0, path.xs
        assert (xs[0, 0] - xs[0, 1]).abs().max() == 0      # one noise, and Euler up to the window
        assert (x0[0] - x0[1]).abs().max() > 0.1 and (xs[0, 1] - xs[0, 2]).abs().max() > 0.1
        # With nothing random, rollout and the sampler that evaluates are one.
        still = rollout(model, four, ts, window, keys, 0.0, shared=True).x0
        torch.testing.assert_close(still, model.sample([(1.0, cond)], 6, noise=start))
        draw = model.draw(PROMPTS, [5, 6, 7], 4).int()
        for i in (0, 1, 2):
            assert (model.draw([PROMPTS[i]], [5 + i], 4).int() - draw[i]).abs().max() <= 1


def test_shuffled_rewards_are_the_same_rewards(parts, tmp_path, monkeypatch):
    """The control row: the same numbers, but credit to other images, of other groups too."""
    seen = []

    def spy(R, *more):
        seen.append(R[:, 0])
        return group_advantage(R, *more)
    monkeypatch.setattr(grpo, "group_advantage", spy)
    tiny.play(parts, tmp_path / "a", "--steps", 1)
    tiny.play(parts, tmp_path / "b", "--steps", 1, "--shuffle")
    right, wrong = seen
    assert not torch.equal(right, wrong) and torch.equal(right.sort()[0], wrong.sort()[0])


def test_reference_of_a_learning_bridge_is_the_initial_one(parts, tmp_path, monkeypatch):
    """--beta with --train both: the KL's other side must not follow the bridge that learns."""
    seen = []

    def spy(model, *inputs):
        (dit, bridge, _), guided = inputs[-2].policy, inputs[-2].branches
        with swapped(model, (dit, bridge)):
            assert model.bridge is bridge and model.dit is dit
        assert model.bridge is not bridge and model.dit is not dit
        seen.append((guided[0][1].ctx, inputs[0][0][1].ctx))
        return surrogate(model, *inputs)
    monkeypatch.setattr(grpo, "surrogate", spy)
    (parts / "one.jsonl").write_text((parts / "prompts.jsonl").read_text().splitlines()[0] + "\n")
    tiny.play(parts, tmp_path / "run", "--steps", 3, "--train", "both", "--beta", 1.0, "--lr", 0.05,
              "--prompts", parts / "one.jsonl")
    (ref, own), *_, (last_ref, last_own) = seen
    torch.testing.assert_close(ref, own)                       # both start as one policy
    assert torch.equal(ref, last_ref) and (own - last_own).abs().max() > 1e-2


@pytest.mark.parametrize("shared", [True, False])
def test_initial_noise_of_a_group(parts, tmp_path, monkeypatch, shared):
    seen = []

    def spy(*inputs):
        seen.append(inputs[4])                             # keys
        return rollout(*inputs)
    monkeypatch.setattr(grpo, "rollout", spy)
    tiny.play(parts, tmp_path / "run", "--steps", 2, "--shared-noise" if shared else
              "--no-shared-noise")
    for keys in seen:
        groups = [[a for a, _ in keys[i : i + G]] for i in range(0, 16, G)]
        assert [len(set(g)) for g in groups] == [1 if shared else G] * 4
        assert len({a for g in groups for a in g}) == (4 if shared else 16)
        # Fresh noise is key + step of the window: no two may ever meet.
        assert len({b + k for _, b in keys for k in range(6)} | {a for a, _ in keys}
                   ) == 16 * 6 + (4 if shared else 16)
    assert not set(seen[0]) & set(seen[1])


# --- a run ---


def saved(out):
    state = torch.load(out / "ckpt" / "optim.pt", weights_only=True)
    return torch.cat([p.flatten() for part in ("raw", "mean") for p in state[part].values()])


def test_resume_continues_as_if_never_stopped(parts, tmp_path, monkeypatch):
    flags = ["--steps", 4, "--train", "both", "--updates", 2, "--beta", 0.01, "--eval-every", 2]
    whole = tiny.play(parts, tmp_path / "a", *flags)
    with tiny.killed_at(grpo, "rollout", 3):
        tiny.play(parts, tmp_path / "b", *flags)
    rows = (tmp_path / "b" / "log.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 3                         # of which no checkpoint knows
    again = tiny.play(parts, tmp_path / "b", *flags, "--resume")
    assert torch.equal(saved(tmp_path / "a"), saved(tmp_path / "b"))
    assert not torch.equal(saved(tmp_path / "a")[:1000], torch.zeros(1000))

    def timeless(rows):
        return [{k: v for k, v in r.items() if k != "at" and not k.startswith("s_")} for r in rows]
    assert timeless(again) == timeless(whole)
    assert [r["at"] for r in again] == sorted(r["at"] for r in again)
    assert {p.name for p in (tmp_path / "b").iterdir()} == {
        "config.json", "log.jsonl", "curves.png", "index.html", "results.json", "samples", "ckpt"}
    assert {p.stem for p in (tmp_path / "b" / "samples").iterdir()} == {
        "step_00000", "step_00002", "step_00004", "before", "after"}


@pytest.fixture
def photos(parts, monkeypatch, tmp_path):
    """-> flags of another world than the classroom, a file of prompts that it is not trained on"""
    monkeypatch.setitem(presets_py.PRESETS, "photos", config(parts, preset="photos"))
    rows = [dict(prompt=f"a photo of {n} stars", flat=True) for n in range(20)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return ["--preset", "photos", "--init", parts / "dit", "--steps", 1], tmp_path / "held.jsonl"


def calls(monkeypatch, name, where):
    """What main hands to one of our functions: [inputs]"""
    seen, real = [], getattr(where, name)
    monkeypatch.setattr(where, name, lambda *inputs: seen.append(inputs) or real(*inputs))
    return seen


def test_trained_prompts_are_no_measure(parts, photos, tmp_path, monkeypatch, capsys):
    """Nothing held out: pictures of training prompts to look at, and no score anywhere."""
    panels, shown = calls(monkeypatch, "redraw", record_py), []
    monkeypatch.setattr(record_py.tqdm, "set_postfix",
                        lambda self, values, **_: shown.append(values))
    rows = tiny.play(parts, tmp_path / "run", *photos[0])
    assert "no held-out prompts" in capsys.readouterr().out
    assert not any("score" in r for r in rows) and shown[0].keys() == {"reward", "norm"}
    assert [p[0] for p in panels[0][1:]] == ["reward_blue", "grad_norm"]
    assert {p.stem for p in (tmp_path / "run/samples").iterdir()} == {"step_00000", "step_00001"}
    # The classroom's are its benchmark.
    shown.clear()
    rows = tiny.play(parts, tmp_path / "shapes", "--steps", 1)
    assert all({"score", "extra", "kB"} <= r.keys() for r in rows)
    assert shown[0].keys() == {"reward", "held out", "norm"}
    assert [p[0] for p in panels[1][1:]] == ["reward_blue", "score", "grad_norm"]
    assert "no held-out" not in capsys.readouterr().out


def test_eval_prompts_of_photos(parts, photos, tmp_path, monkeypatch, capsys):
    """--eval-prompts: 16 of them, evenly spaced, are drawn and scored; none that is trained."""
    flags, file = photos
    scored = calls(monkeypatch, "score", eval_py)
    rows = tiny.play(parts, tmp_path / "run", *flags, "--eval-prompts", file)
    looks = [[m["prompt"] for m in rows] for _, rows, *_ in scored if "group" not in rows[0]]
    assert looks == [[f"a photo of {i * 20 // 16} stars" for i in range(16)]] * 2
    assert all(r["score"] == pytest.approx(1 / 3) for r in rows)
    assert "no held-out" not in capsys.readouterr().out

    trained = json.loads(open(parts / "prompts.jsonl").readline())["prompt"]
    both = tmp_path / "both.jsonl"
    both.write_text(file.read_text() + json.dumps(dict(prompt=trained)) + "\n")
    (tmp_path / "none.jsonl").write_text("")
    before = files(tmp_path)
    for more, words in ((["--eval-prompts", both], f"{trained!r} is in "),
                        (["--eval-prompts", both], "as 1 of its 21 prompts are"),
                        (["--eval-prompts", tmp_path / "none.jsonl"], "holds no prompts"),
                        (["--eval-prompts", tmp_path / "gone"], "must be a file"),
                        (["--eval-prompts", file, "--reward", '{"x": "blue"}'], "no mix for"),
                        (["--eval-prompts", file, "--preset", "shapes"], "is for photos")):
        assert words in complaint(tiny.play, parts, tmp_path / "no", *flags, *more)
    assert files(tmp_path) == before


def test_ema():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    ema, mean = Ema({"p": p}, 0.5), 1.0
    for step in range(9):
        p.data += 1
        ema.update(step)
        d = min(0.5, (1 + step) / (10 + step))             # a short memory while there is little
        mean = d * mean + (1 - d) * p.item()
        assert ema.mean["p"].item() == pytest.approx(mean)
    with ema.applied():
        assert p.item() == pytest.approx(mean)
    assert p.item() == 10 and p.requires_grad
