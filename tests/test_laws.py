"""Laws: the DiT is diffusers' SD3, padding changes nothing, random steps do what they claim."""

import numpy as np
import pytest
import torch
from diffusers import (DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler,
                       SD3Transformer2DModel)

from model import MMDiT, dpm_step, sde_step, sigmas

CONFIG = dict(sample_size=16, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8,
              num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32,
              pooled_projection_dim=12, out_channels=4, pos_embed_max_size=12,
              dual_attention_layers=(0, 1), qk_norm="rms_norm")
KINDS = ["flow", "unirl", "dance", "cps", "cps-simple"]


def randomise(model):
    """Every parameter random: zero-initialised layers would hide errors."""
    torch.manual_seed(1)
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    return model.eval().requires_grad_(False)


def inputs(B=3, H=12, W=8, L=5):
    g = torch.Generator().manual_seed(2)
    return (torch.randn(B, 4, H, W, generator=g), torch.rand(B, generator=g),
            torch.randn(B, L, 24, generator=g), torch.randn(B, 12, generator=g))


def same(a, b, tol=1e-5):
    assert b.abs().max() > 0.1, "compares nothing but zeros"
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


# --- the DiT ---


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("dual", [(), (0, 1)])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_mmdit_is_diffusers_sd3(layers, dual, qk_norm):
    config = CONFIG | dict(num_layers=layers, dual_attention_layers=dual, qk_norm=qk_norm)
    theirs, ours = SD3Transformer2DModel(**config), MMDiT(**config)
    assert ours.config == config
    same(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed, 1e-6)      # before any loading
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, t, ctx, pooled = inputs()
    same(ours(x, t, ctx, pooled=pooled), theirs(x, ctx, pooled, 1000 * t).sample)
    same(ours(x, 0.3, ctx), theirs(x, ctx, 0 * pooled, torch.full((3,), 300.0)).sample)


def test_init_starts_at_velocity_zero():
    x, t, ctx, _ = inputs()
    dit = MMDiT(**CONFIG)
    assert not dit(x, t, ctx).any()
    assert all(p.any() for n, p in dit.named_parameters()
               if n.endswith("weight") and "norm" not in n and n != "proj_out.weight")


@pytest.mark.parametrize("dual", [(), (0, 1)])
def test_ragged_references_are_singles(dual):
    dit = randomise(MMDiT(**CONFIG | dict(dual_attention_layers=dual)))
    x, t, ctx, pooled = inputs()
    refs = [[torch.randn(4, 6, 10), torch.randn(4, 12, 8)], [], [torch.randn(4, 4, 4)]]
    mask = torch.tensor([5, 2, 3])[:, None] > torch.arange(5)
    v = dit(x, t, ctx, mask, pooled, refs)
    for b, n in enumerate([5, 2, 3]):
        one = slice(b, b + 1)
        same(v[one], dit(x[one], t[one], ctx[one, :n], None, pooled[one], refs[one]))
    same(v[1:2], dit(x[1:2], t[1:2], ctx[1:2, :2], pooled=pooled[1:2]))  # no reference, no trace
    assert (v - dit(x, t, ctx, mask, pooled)).flatten(1).abs().amax(1)[[0, 2]].min() > 1e-3


@pytest.mark.parametrize("n", [1, 3])
def test_references_are_more_sequence(n):
    """diffusers fed [target | references] as one row of ready-made tokens gives the same target."""
    theirs, ours = randomise(SD3Transformer2DModel(**CONFIG)), MMDiT(**CONFIG)
    ours.load_state_dict(theirs.state_dict())
    x, t, ctx, pooled = inputs(B=2, H=8, W=8)
    refs = torch.randn(n, 2, 4, 4, 16)                        # other shape, as many tokens
    v = ours(x, t, ctx, pooled=pooled, refs=[list(row) for row in refs.transpose(0, 1)])
    tokens = torch.cat([theirs.pos_embed(x), *map(theirs.pos_embed, refs)], 1)    # (B,16+16n,D)
    theirs.pos_embed = torch.nn.Identity()
    theirs.pos_embed.forward = lambda _: tokens
    out = theirs(torch.zeros(2, 4, 8 + 8 * n, 8), ctx, pooled, 1000 * t).sample
    # the tokens unpatchify as rows of 4 patches; the target's 16 are the first 4 of these rows
    same(v, out[:, :, :8])


def test_order_of_references():
    """As DeepGen's: each is coded from its own centre, so the DiT sees them as a set."""
    dit = randomise(MMDiT(**CONFIG))
    x, t, ctx, pooled = inputs()
    a, b, c = (torch.randn(4, *size) for size in ((6, 10), (12, 8), (6, 10)))
    v = dit(x, t, ctx, pooled=pooled, refs=[[a, b, c]] * 3)
    same(dit(x, t, ctx, pooled=pooled, refs=[[c, a, b], [b, a, c], [a, b, c]]), v)
    assert (dit(x, t, ctx, pooled=pooled, refs=[[a, b, b]] * 3) - v).abs().max() > 1e-3


@pytest.mark.parametrize("dual", [(), (0, 1)])
def test_padding_changes_nothing(dual):
    dit = randomise(MMDiT(**CONFIG | dict(dual_attention_layers=dual)))
    x, t, ctx, pooled = inputs()
    v = dit(x, t, ctx, pooled=pooled)
    same(dit(x, t, ctx, torch.ones(3, 5, dtype=torch.bool), pooled), v)
    padded = torch.cat([ctx, torch.full((3, 4, 24), 7.0)], 1)
    mask = torch.arange(9).expand(3, -1) < 5
    same(dit(x, t, padded, mask, pooled), v)
    assert (dit(x, t, padded, pooled=pooled) - v).abs().max() > 1e-2              # unmasked: seen


def test_mmdit_under_bf16():
    dit = randomise(MMDiT(**CONFIG))
    x, t, ctx, pooled = inputs()
    v = dit(x, t, ctx, pooled=pooled)
    with torch.autocast("cpu", torch.bfloat16):
        low = dit(x, t, ctx, pooled=pooled)
    pure = dit.bfloat16()(x, t, ctx, pooled=pooled)
    for a in (low, pure):
        assert a.dtype == torch.float32 and (a - v).norm() < 0.05 * v.norm()


# --- the schedule ---


@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 3.1])
def test_sigmas_are_diffusers_shifted_once(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    ours = sigmas(steps, shift)
    assert ours.dtype == torch.float32 and ours[0] == 1 and ours[-1] == 0
    torch.testing.assert_close(ours, scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 10, 28, 40, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grid_of_diffusers(steps, shift):
    """Its scheduler's own table, as pipelines and peers step on it."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    ours = sigmas(steps, shift, "diffusers")
    assert ours.dtype == torch.float32 and ours[0] == 1 and ours[-1] == 0
    torch.testing.assert_close(ours, scheduler.sigmas, atol=1e-6, rtol=0)


def test_both_grids_in_figures():
    want = dict(uniform=[0.5625, 0.4286, 0.25, 0], diffusers=[0.4649, 0.2780, 0.0089, 0])
    for grid, end in want.items():
        torch.testing.assert_close(sigmas(10, 3.0, grid)[-4:], torch.tensor(end), atol=5e-5, rtol=0)
    t = torch.linspace(1, 0, 11, dtype=torch.float64)
    assert torch.equal(sigmas(10, 3.0), (3 * t / (1 + 2 * t)).float())      # to the last bit
    with pytest.raises(ValueError, match="grid is uniform or diffusers, not 'karras'"):
        sigmas(10, 3.0, "karras")


# --- the second-order step ---


def dpm(velocity, x, ts):
    before = None
    for t, s in zip(ts, ts[1:]):
        x, before = dpm_step(velocity(x, t), x, t, s, before)
    return x


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # its own call
@pytest.mark.parametrize("steps", [1, 2, 10, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_is_diffusers(steps, shift):
    """On the scheduler's own times, .999 of the uniform ones before the shift."""
    def velocity(x, t):
        return (2 * x + 3 * t).sin() + t * x
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift,
        algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(steps)
    ts, (start, _, _) = scheduler.sigmas.tolist(), draw()
    t = 0.999 * torch.linspace(1, 0, steps + 1)
    torch.testing.assert_close(torch.tensor(ts), shift * t / (1 + (shift - 1) * t))
    x = start
    for at, t in zip(scheduler.timesteps, ts):
        x = scheduler.step(velocity(x, t), at, x).prev_sample
    ours = dpm(velocity, start, ts)
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)
    one = start - ts[0] * velocity(start, ts[0])                      # one step is Euler's
    assert torch.allclose(ours, one, atol=1e-5) == (steps == 1)


# --- the random step ---


def draw(B=6, seed=3):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, 4, 6, 5, generator=g) for _ in range(3))


@pytest.mark.parametrize("grid", ["uniform", "diffusers"])
def test_figures_at_pure_noise(grid):
    """10 steps, eta .7: the coefficient of x at t = 1 is .755 and std .70, on either grid."""
    _, x, _ = draw()
    t, s = sigmas(10, 3.0, grid)[:2].tolist()
    for kind in ("flow", "unirl"):
        _, _, mean, std = sde_step(torch.zeros_like(x), x, t, s, 0.7, kind)
        torch.testing.assert_close(mean, 0.755 * x, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(std, torch.full_like(std, 0.7), atol=1e-5, rtol=0)


def test_the_grid_of_diffusers_by_steps():
    """Its last but one step, .2780 -> .0089, is random and can be trained. The tiny last one is
    not, where the formula of Flow-GRPO and UniRL-Zero would still add noise of std .006."""
    v, x, noise = draw()
    ts = sigmas(10, 3.0, "diffusers").tolist()
    for t, s in zip(ts, ts[1:]):
        y, logp, _, std = sde_step(v, x, t, s, 0.7, noise=noise)
        assert y.isfinite().all() and y.abs().max() < 10
        room = 1 - (t if t < 1 else s)
        theirs = 0.7 * (t / room) ** 0.5 * (t - s) ** 0.5
        if s:
            assert std[0].item() == pytest.approx(theirs, rel=1e-4) and logp.all()
        else:
            assert theirs == pytest.approx(0.0063, abs=1e-4) and not std.any() and not logp.any()
            torch.testing.assert_close(y, x - t * v)


@pytest.mark.parametrize("kind", KINDS)
def test_step_laws(kind):
    v, x, noise = draw()
    for t, s in [(1.0, 0.9), (0.7, 0.5), (0.1, 0.0), (1.0, 0.0)]:
        euler = x - (t - s) * v
        y, logp, mean, std = sde_step(v, x, t, s, 0.0, kind)                      # eta 0 is Euler
        torch.testing.assert_close(y, euler, atol=2e-6, rtol=0)
        assert torch.equal(y, mean) and not logp.any() and not std.any()

        y, logp, mean, std = sde_step(v, x, t, s, 0.7, kind, noise=noise)
        assert mean.shape == x.shape and std.shape == (6, 1, 1, 1) and logp.shape == (6,)
        torch.testing.assert_close(y, mean + std * noise)
        assert y.isfinite().all() and logp.isfinite().all() and y.abs().max() < 10
        assert torch.equal(sde_step(v, x, t, s, 0.7, kind, x_next=y)[1], logp)    # ratio is 1
        if s == 0:
            torch.testing.assert_close(y, euler, atol=2e-6, rtol=0)
            assert not logp.any() and not std.any()
        else:
            density = torch.distributions.Normal(mean, std).log_prob(y)
            want = -(y - mean) ** 2 if kind == "cps-simple" else density
            torch.testing.assert_close(logp, want.mean((1, 2, 3)), atol=1e-5, rtol=1e-5)
            assert (sde_step(v, x, t, s, 0.7, kind, x_next=y + 0.5)[1] != logp).all()
    torch.manual_seed(0)
    a = sde_step(v, x, 0.7, 0.5, 0.7, kind)[0]
    assert not torch.equal(a, sde_step(v, x, 0.7, 0.5, 0.7, kind)[0])             # fresh noise


@pytest.mark.parametrize("kind", KINDS)
def test_one_time_per_sample_is_a_loop(kind):
    v, x, noise = draw()
    t = torch.tensor([1.0, 0.9, 0.6, 0.3, 0.1, 1.0])
    s = torch.tensor([0.9, 0.7, 0.5, 0.2, 0.0, 0.8])
    batch = sde_step(v, x, t, s, 0.7, kind, noise=noise)
    for b in range(6):
        one = slice(b, b + 1)
        single = sde_step(v[one], x[one], t[b].item(), s[b].item(), 0.7, kind, noise=noise[one])
        for got, want in zip(batch, single):
            torch.testing.assert_close(got[one], want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_v_and_is_finite(kind):
    """Also beside rows without noise, whose 0/0 must not leak through torch.where."""
    v, x, _ = draw()
    t = torch.tensor([1.0, 1.0, 0.6, 0.3, 0.1, 1.0])
    s = torch.tensor([0.9, 0.0, 0.5, 0.2, 0.0, 0.8])
    v.requires_grad_()
    y = sde_step(v, x, t, s, 0.7, kind)[0].detach()
    sde_step(v, x, t, s, 0.7, kind, x_next=y)[1].sum().backward()
    seen = v.grad.flatten(1).abs().amax(1) > 0
    assert v.grad.isfinite().all() and seen.tolist() == (s > 0).tolist()


def test_flow_is_unirl():
    v, x, noise = draw()
    t = torch.tensor([0.95, 0.8, 0.6, 0.4, 0.2, 0.1])
    for a, b in zip(sde_step(v, x, t, t - 0.05, 0.7, "flow", noise=noise),
                    sde_step(v, x, t, t - 0.05, 0.7, "unirl", noise=noise)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_unknown_kind_is_taught():
    with pytest.raises(ValueError, match="flow, unirl, dance, cps or cps-simple"):
        sde_step(*draw()[:2], 0.7, 0.5, 0.7, "ode")


# --- the law behind them: with the exact velocity, the SDE's marginals are the ODE's ---

MU, W, SIG = (torch.tensor(a) for a in ([-2.0, 0.5, 2.0], [0.2, 0.5, 0.3], [0.3, 0.2, 0.5]))
n = 2**17
QUANTILE = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n).float()


def exact_velocity(x, t):
    """E[eps - x_0 | x_t = x] of the 1-D mixture; x (n,)."""
    var = (1 - t) ** 2 * SIG**2 + t**2                                            # (3,)
    off = x[:, None] - (1 - t) * MU                                               # (n,3)
    post = (W.log() - var.log() / 2 - off**2 / (2 * var)).softmax(1)
    return (post * ((t - (1 - t) * SIG**2) / var * off - MU)).sum(1)


def euler(velocity, x, ts):
    for t, s in zip(ts, ts[1:]):
        x = x - (t - s) * velocity(x, t)
    return x


def runge_kutta(velocity, x, ts):
    """The classical one, of fourth order: with many steps, the truth."""
    for t, s in zip(ts, ts[1:]):
        d, k = s - t, [velocity(x, t)]
        for part in (0.5, 0.5, 1):
            k.append(velocity(x + part * d * k[-1], t + part * d))
        x = x + d / 6 * (k[0] + 2 * k[1] + 2 * k[2] + k[3])
    return x


def misses(solver, ends, steps):
    """Mean distance to the ODE's own end of 2,000 particles, for each number of steps."""
    x = QUANTILE[:: n // 2000].double()
    many, *tries = [torch.linspace(*ends, k + 1, dtype=torch.float64).tolist()
                    for k in (300, *steps)]
    truth = runge_kutta(exact_velocity, x, many)
    return [(solver(exact_velocity, x, ts) - truth).abs().mean().item() for ts in tries]


def test_dpm_is_of_second_order():
    """From noise to data, where both ends cost it log(1/d), and without the ends."""
    steps = (10, 20, 40, 80, 160)
    first, second = (misses(f, (1, 0), steps) for f in (euler, dpm))
    assert all(b < a / 2 for a, b in zip(first, second)), (first, second)
    d2log = [np.log(k) / k**2 for k in steps]
    assert 0.8 < (first[0] / first[-1]) / 16 < 1.2, first
    assert 0.7 < (second[0] / second[-1]) / (d2log[0] / d2log[-1]) < 1.5, second
    within = misses(dpm, (0.9, 0.1), (80, 160, 320))
    assert all(3.5 < a / b < 4.5 for a, b in zip(within, within[1:])), within


def distance(x, t):
    """Wasserstein-1 of particles (n,) to the true marginal at t, whose quantiles are exact."""
    grid = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    std = ((1 - t) ** 2 * SIG**2 + t**2).sqrt()
    cdf = (W * torch.special.ndtr((grid[:, None] - (1 - t) * MU) / std)).sum(1)
    level = (np.arange(n) + 0.5) / n
    return (x.sort()[0] - torch.tensor(np.interp(level, cdf, grid))).abs().mean().item()


def error(kind, steps, eta, end=0.0):
    """W1 at time `end` of n particles that start as exact noise, `steps` steps from 1 to 0."""
    torch.manual_seed(0)
    x, ts = QUANTILE[torch.randperm(n)], sigmas(steps).tolist()
    for t, s in zip(ts, ts[1:]):
        if s >= end:
            v = exact_velocity(x, t)
            x = sde_step(v.view(1, 1, 1, n), x.view(1, 1, 1, n), t, s, eta, kind)[0].view(n)
    return distance(x, end)


def test_the_ode_reaches_the_data():
    coarse, fine = error("flow", 10, 0.0), error("flow", 80, 0.0)
    assert fine < 0.02 and fine < coarse / 6, (coarse, fine)


@pytest.mark.parametrize("end", [0.5, 0.0])
@pytest.mark.parametrize("kind", ["flow", "unirl", "dance"])
def test_sde_marginals_are_the_odes(kind, end):
    coarse, fine = error(kind, 10, 0.7, end), error(kind, 80, 0.7, end)
    assert fine < 0.015 and fine < coarse / 2, (coarse, fine)


def test_cps_keeps_only_the_noise_level():
    coarse, fixed = error("cps", 10, 0.7), error("cps", 80, 0.7)
    shrinking = error("cps", 80, 0.7 / 8**0.5)                            # eta as sqrt(d)
    assert fixed > 0.15 and fixed > 0.6 * coarse, (coarse, fixed)         # does not converge
    assert shrinking < 0.05 and shrinking < coarse / 5, (coarse, shrinking)
