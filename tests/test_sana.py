"""SanaDiT is diffusers' SANA, key for key and number for number; a reference is only added."""

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch.nn import functional as F

from common.sana import SanaDiT, attend_linearly

CONFIG = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
              num_layers=3, num_cross_attention_heads=4, cross_attention_head_dim=8,
              cross_attention_dim=32, caption_channels=24, mlp_ratio=2.5, sample_size=16,
              patch_size=2, interpolation_scale=None, qk_norm="rms_norm_across_heads")
QK_NORMS = [None, "rms_norm_across_heads"]
SANA = dict(num_layers=20, num_attention_heads=70, attention_head_dim=32, caption_channels=2304,
            num_cross_attention_heads=20, cross_attention_head_dim=112, cross_attention_dim=2240)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomise(model):
    """No parameter stays 0 or 1, which would hide errors. Not much noise: where a q is hardly
    positive anywhere, linear attention divides two tiny sums and magnifies every rounding."""
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    return model.eval().requires_grad_(False)


def inputs(B=3, H=12, W=8, L=5):
    g = torch.Generator().manual_seed(2)
    lengths = torch.tensor([5, 2, 3])[:B]
    return (torch.randn(B, 4, H, W, generator=g), torch.rand(B, generator=g),
            torch.randn(B, L, 24, generator=g), lengths[:, None] > torch.arange(L))


def same(a, b, tol=1e-5):
    assert b.abs().max() > 0.1, "compares nothing but zeros"
    assert a.dtype == torch.float32 and a.shape == b.shape
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


# --- diffusers' SANA ---


@pytest.mark.parametrize("size", [(12, 8), (8, 12), (16, 16)])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_sana_is_diffusers_sana(qk_norm, patch, size):
    config = CONFIG | dict(qk_norm=qk_norm, patch_size=patch)
    theirs, ours = randomise(SanaTransformer2DModel(**config)), SanaDiT(**config)
    assert ours.config == config | dict(ref="none")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, t, ctx, mask = inputs(H=size[0], W=size[1])
    same(ours(x, t, ctx), theirs(x, ctx, 1000 * t).sample)
    masked = theirs(x, ctx, 1000 * t, encoder_attention_mask=mask).sample
    same(ours(x, t, ctx, mask), masked)
    assert (masked - ours(x, t, ctx)).flatten(1).abs().amax(1)[1:].min() > 1e-2      # mask matters


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_places_of_the_2k_and_4k_checkpoints(scale):
    """Their codes are in no file; at any size they span what sample_size does."""
    config = CONFIG | dict(interpolation_scale=scale)
    theirs, ours = randomise(SanaTransformer2DModel(**config)), SanaDiT(**config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for H, W in [(16, 16), (12, 8), (24, 32)]:
        x, t, ctx, mask = inputs(H=H, W=W)
        v = theirs(x, ctx, 1000 * t, encoder_attention_mask=mask).sample
        same(ours(x, t, ctx, mask), v)


@pytest.mark.parametrize("published, keys, billions", [
    (SANA, 396, 1.60),                                                         # SANA 1.6B
    (SANA | dict(qk_norm="rms_norm_across_heads"), 476, 1.60),                 # SANA-1.5 1.6B
    (SANA | dict(num_layers=28, num_attention_heads=36, num_cross_attention_heads=16,
                 cross_attention_head_dim=72, cross_attention_dim=1152), 548, 0.59),    # SANA 0.6B
])
def test_full_size(published, keys, billions):
    with torch.device("meta"):
        theirs, ours = SanaTransformer2DModel(**published), SanaDiT(**published)
    shapes = {k: p.shape for k, p in ours.state_dict().items()}
    assert shapes == {k: p.shape for k, p in theirs.state_dict().items()} and len(shapes) == keys
    assert sum(s.numel() for s in shapes.values()) / 1e9 == pytest.approx(billions, abs=0.006)


# --- laws ---


@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_a_padded_caption_is_the_caption(qk_norm):
    dit = randomise(SanaDiT(**CONFIG | dict(qk_norm=qk_norm)))
    x, t, ctx, mask = inputs()
    v = dit(x, t, ctx.masked_fill(~mask[..., None], 7.0), mask)
    for b, n in enumerate([5, 2, 3]):
        one = slice(b, b + 1)
        same(v[one], dit(x[one], t[one], ctx[one, :n]))
    same(dit(x, t, ctx, torch.ones_like(mask)), dit(x, t, ctx))


def test_times_and_pooled():
    dit = randomise(SanaDiT(**CONFIG))
    x, t, ctx, mask = inputs()
    v = dit(x, t.fill_(0.3), ctx, mask)
    for time in (0.3, torch.tensor(0.3)):
        assert torch.equal(dit(x, time, ctx, mask, pooled=torch.ones(3, 7)), v)
    assert (dit(x, 0.301, ctx, mask) - v).abs().max() > 1e-5


def test_linear_attention_is_attention_with_relu():
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    weights = q.relu() @ k.relu().mT                                          # (B,heads,N,N)
    want = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(attend_linearly(q, k, v), want, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):                               # still in fp32
        assert torch.equal(attend_linearly(q, k, v), attend_linearly(q, k, v.clone()))
        torch.testing.assert_close(attend_linearly(q, k, v), want, atol=1e-5, rtol=1e-5)
    q, k, v = (a.clone().requires_grad_() for a in (-q.abs(), k, v))          # nothing to attend to
    y = attend_linearly(q, k, v)
    y.sum().backward()
    assert not y.any() and all(a.grad.isfinite().all() for a in (q, k, v))


def test_sana_under_bf16():
    dit = randomise(SanaDiT(**CONFIG))
    x, t, ctx, mask = inputs()
    v = dit(x, t, ctx, mask)
    with torch.autocast("cpu", torch.bfloat16):
        low = dit(x, t, ctx, mask)
    pure = dit.bfloat16()(x, t, ctx, mask)
    for a in (low, pure):
        assert a.dtype == torch.float32 and (a - v).norm() < 0.05 * v.norm()


def test_init_starts_at_velocity_zero_and_learns():
    x, t, ctx, mask = inputs()
    dit = SanaDiT(**CONFIG, ref="add")
    refs, target = [[a] for a in x.flip(0)], torch.randn_like(x)
    assert not dit(x, t, ctx, mask, refs=refs).any()
    opt = torch.optim.Adam(dit.parameters(), lr=1e-2)
    for _ in range(3):                                # what is behind a zero learns a step later
        opt.zero_grad()
        loss = (dit(x, t, ctx, mask, refs=refs) - target).square().mean()
        loss.backward()
        opt.step()
    still = [k for k, p in dit.named_parameters() if not p.grad.any()]
    assert not still and loss < target.square().mean(), still


# --- references ---


@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_a_reference_starts_as_nothing(qk_norm):
    plain = randomise(SanaDiT(**CONFIG | dict(qk_norm=qk_norm)))
    dit = SanaDiT(**CONFIG | dict(qk_norm=qk_norm), ref="add")
    four = {f"{m}.{p}" for m in ("ref_patch_embed.proj", "ref_linear") for p in ("weight", "bias")}
    assert dit.state_dict().keys() - plain.state_dict().keys() == four
    dit.load_state_dict(dit.with_refs(plain.state_dict()), strict=True)
    assert torch.equal(dit.ref_patch_embed.proj.weight, plain.patch_embed.proj.weight)
    assert torch.equal(dit.ref_patch_embed.proj.bias, plain.patch_embed.proj.bias)
    x, t, ctx, mask = inputs()
    v = plain(x, t, ctx, mask)
    for refs in (None, [[], [], []], [[r] for r in torch.randn_like(x)], [[], [x[0]], []]):
        assert torch.equal(dit(x, t, ctx, mask, refs=refs), v)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_reference_is_added_to_the_tokens(patch):
    """diffusers, its patch embedding replaced by the written-out sum, gives the same velocity."""
    dit = randomise(SanaDiT(**CONFIG | dict(patch_size=patch), ref="add"))
    theirs = SanaTransformer2DModel(**CONFIG | dict(patch_size=patch)).eval()
    theirs.load_state_dict({k: p for k, p in dit.state_dict().items() if "ref_" not in k})
    x, t, ctx, mask = inputs()
    ref = torch.randn_like(x)
    w = dit.state_dict()

    def tokens(image, name):
        pieces = F.unfold(image, patch, stride=patch).mT                            # (B,N,C*p*p)
        return pieces @ w[f"{name}.proj.weight"].flatten(1).T + w[f"{name}.proj.bias"]
    extra = tokens(ref, "ref_patch_embed") @ w["ref_linear.weight"].T + w["ref_linear.bias"]
    extra[1] = 0                                                            # this one has none
    total = tokens(x, "patch_embed") + extra
    theirs.patch_embed.forward = lambda _: total
    v = dit(x, t, ctx, mask, refs=[[ref[0]], [], [ref[2]]])
    same(v, theirs(x, ctx, 1000 * t, encoder_attention_mask=mask).sample)
    plain = dit(x, t, ctx, mask)
    same(v[1:2], plain[1:2])
    assert (v - plain).flatten(1).abs().amax(1)[[0, 2]].min() > 1e-2


def test_wrong_references_are_taught():
    x, t, ctx, _ = inputs()
    dit = SanaDiT(**CONFIG, ref="add")
    for refs, message in [([[x[0, :, :4]], [], []], "target's size"), ([[x[0]]], "1 lists"),
                          ([[x[0], x[1]], [], []], "one per sample, not 2")]:
        with pytest.raises(AssertionError, match=message):
            dit(x, t, ctx, refs=refs)
    with pytest.raises(AssertionError, match="without references"):
        SanaDiT(**CONFIG)(x, t, ctx, refs=[[x[0]], [], []])
    with pytest.raises(AssertionError, match="does not divide into 2x2 patches"):
        dit(x[:, :, :3], t, ctx)
