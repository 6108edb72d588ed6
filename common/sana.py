"""SanaDiT: SANA's linear transformer, under diffusers' parameter names.

B batch, N image tokens, L context tokens, D width, C H W latent
"""

import torch
import torch.nn.functional as F
from torch import nn

from common.layers import (MLP, RMSNorm, attend, modulate, norm, per_sample, places, run_block,
                           time_wave, unpatchify)


def attend_linearly(q, k, v):
    """relu(q) relu(k)' v with the weights of each row scaled to sum 1, all (B,heads,N,d).
    Bracketed as relu(q) (relu(k)' v) it never forms the N x N weights: the cost grows with N.
    In fp32, also under autocast: the sums run over all N tokens, and one divides the other."""
    with torch.autocast(q.device.type, enabled=False):
        q, k, values = q.relu().float(), k.relu().float(), v.float()
        total = q @ k.sum(2)[..., None]                                              # (B,heads,N,1)
        return (q @ (k.mT @ values) / (total + 1e-15)).to(v.dtype)                   # (B,heads,N,d)


class SanaAttention(nn.Module):
    """Linear attention among the image tokens or, with `cross`, softmax attention to the context.
    Unlike SD3's, qk_norm is over all heads at once."""

    def __init__(self, D, heads, head_dim, qk_norm, cross):
        super().__init__()
        self.heads, self.cross, inner = heads, cross, heads * head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, inner, bias=cross) for _ in range(3))
        self.norm_q, self.norm_k = (
            RMSNorm(inner, eps=1e-5) if qk_norm else nn.Identity() for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(inner, D)])

    def forward(self, x, ctx, mask=None):
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(ctx)), self.to_v(ctx)
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (q, k, v))
        y = attend(q, k, v, mask) if self.cross else attend_linearly(q, k, v)        # (B,heads,N,d)
        return self.to_out[0](y.transpose(1, 2).flatten(2))                          # (B,N,D)


class MixFFN(nn.Module):
    """A gated feed-forward with a 3x3 convolution: what a token learns of where it stands. Linear
    attention sees a set, and SANA has no positional code; the image's border gives the place."""

    def __init__(self, D, hidden):
        super().__init__()
        self.conv_inverted = nn.Conv2d(D, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, D, 1, bias=False)

    def forward(self, x, rows):
        x = x.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)                     # (B,D,rows,columns)
        x, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, 1)
        return self.conv_point(x * F.silu(gate)).flatten(2).mT                       # (B,N,D)


class SanaBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward. The time modulates the outer two, through six
    vectors that all blocks share plus this block's own table (adaLN-single of PixArt)."""

    def __init__(self, D, heads, head_dim, cross_heads, cross_head_dim, mlp_ratio, qk_norm):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, D) / D**0.5)
        self.attn1 = SanaAttention(D, heads, head_dim, qk_norm, cross=False)
        self.attn2 = SanaAttention(D, cross_heads, cross_head_dim, qk_norm, cross=True)
        self.ff = MixFFN(D, int(mlp_ratio * D))

    def forward(self, x, ctx, c, mask, rows):
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (
            self.scale_shift_table + c).chunk(6, 1)                                  # 6 x (B,1,D)
        y = modulate(norm(x), shift, scale)
        x = x + gate * self.attn1(y, y)
        x = x + self.attn2(x, ctx, mask)                           # neither normed nor gated
        return x + gate_ff * self.ff(modulate(norm(x), shift_ff, scale_ff), rows)


class SanaDiT(nn.Module):
    """SANA (Xie et al. 2024, fig. 5), SANA-1.5 when it has qk_norm; not SANA-Sprint, which also
    embeds its guidance. ref="add" is UniRL-Zero's: the tokens of one reference are added."""

    def __init__(self, in_channels=32, out_channels=32, num_attention_heads=70,
                 attention_head_dim=32, num_layers=20, num_cross_attention_heads=20,
                 cross_attention_head_dim=112, cross_attention_dim=2240, caption_channels=2304,
                 mlp_ratio=2.5, sample_size=32, patch_size=1, interpolation_scale=None,
                 qk_norm=None, ref="none"):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        D = num_attention_heads * attention_head_dim
        assert cross_attention_dim == D, "the caption is projected to the image's width"
        assert qk_norm in (None, "rms_norm_across_heads"), (
            f"qk_norm is None or 'rms_norm_across_heads', not {qk_norm!r}")
        assert ref in ("none", "add"), f"ref is 'none' or 'add', not {ref!r}"
        self.config, self.checkpoint = config, False
        self.latent_channels, self.patch_size, self.width = in_channels, patch_size, D
        self.context_dim, self.pooled_dim, self.most_refs = caption_channels, 0, int(ref == "add")
        self.joint = False

        def patches():
            return nn.ModuleDict(dict(
                proj=nn.Conv2d(in_channels, D, patch_size, stride=patch_size)))
        self.patch_embed = patches()
        if ref == "add":
            self.ref_patch_embed, self.ref_linear = patches(), nn.Linear(D, D)
        self.time_embed = nn.ModuleDict(dict(
            emb=nn.ModuleDict(dict(timestep_embedder=MLP(256, D))), linear=nn.Linear(D, 6 * D)))
        self.caption_projection = MLP(caption_channels, D, nn.GELU("tanh"))
        self.caption_norm = RMSNorm(D, eps=1e-5)
        self.transformer_blocks = nn.ModuleList(
            SanaBlock(D, num_attention_heads, attention_head_dim, num_cross_attention_heads,
                      cross_attention_head_dim, mlp_ratio, qk_norm) for _ in range(num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, D) / D**0.5)
        self.proj_out = nn.Linear(D, patch_size**2 * out_channels)
        self.init()

    def init(self):
        """For training from scratch."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a Linear in disguise
        nn.init.zeros_(self.patch_embed.proj.bias)
        zero = [b.attn2.to_out[0] for b in self.transformer_blocks] + [self.proj_out]
        for m in zero + [self.time_embed.linear]:
            nn.init.zeros_(m.weight)
        if self.config["ref"] == "add":
            self.load_state_dict(self.with_refs(self.state_dict()))

    def with_refs(self, weights):
        """Weights of a SANA without references, plus the four that ref="add" wants, as UniRL-Zero
        starts them: a copy of the patch embedding, and ref_linear 0, which changes nothing yet.
        Without references: the weights as they are."""
        if not self.most_refs:
            return weights
        patch = {f"ref_{k}": v.clone() for k, v in weights.items() if k.startswith("patch_embed.")}
        linear = {f"ref_linear.{k}": torch.zeros(p.shape)
                  for k, p in self.ref_linear.named_parameters()}
        return weights | patch | linear

    def add_refs(self, x, refs, size):
        """x (B,N,D) and B lists of at most one (C,H,W) -> (B,N,D).
        Departs from UniRL-Zero, where no reference is a reference of zeros: once trained, its
        biases would speak. Here it adds nothing."""
        assert self.config["ref"] == "add", "this SanaDiT was built without references: ref='none'"
        assert len(refs) == len(x), f"{len(refs)} lists of references for a batch of {len(x)}"
        for r in refs:
            assert len(r) < 2, f"added references are one per sample, not {len(r)}"
            assert not r or r[0].shape[-2:] == size, (
                f"an added reference has the target's size {tuple(size)}, not {tuple(r[0].shape)}")
        proj = self.ref_patch_embed.proj
        ref = torch.stack([r[0] for r in refs if r]).to(proj.weight.dtype)
        ref = self.ref_linear(proj(ref).flatten(2).mT)                               # (few,N,D)
        at = torch.tensor([b for b, r in enumerate(refs) if r]).to(x.device)         # (few,)
        return x.index_add(0, at, ref.to(x.dtype))

    def forward(self, x, t, ctx, ctx_mask=None, pooled=None, refs=None):
        """As MMDiT's, with the same shapes. SANA has no use for `pooled`; a row of ctx_mask has at
        least one True; a sample has one reference of the target's size, or none."""
        p, (H, W), dtype = self.config["patch_size"], x.shape[-2:], self.proj_out.weight.dtype
        assert H % p == 0 and W % p == 0, f"a {H}x{W} latent does not divide into {p}x{p} patches"
        time = self.time_embed.emb.timestep_embedder(time_wave(per_sample(t, x)))    # (B,D)
        c = self.time_embed.linear(F.silu(time)).unflatten(1, (6, -1))               # (B,6,D)
        ctx = self.caption_norm(self.caption_projection(ctx))                        # (B,L,D)
        mask = None if ctx_mask is None else ctx_mask.bool()[:, None, None]          # (B,1,1,L)
        x = self.patch_embed.proj(x.to(dtype)).flatten(2).mT                         # (B,N,D)
        if self.config["interpolation_scale"]:            # the 2K and 4K checkpoints alone have it
            span = self.config["sample_size"] // p / self.config["interpolation_scale"]
            x = (x + places(H // p, W // p, span, x.shape[-1], x.device)).to(x.dtype)
        if any(refs or ()):
            x = self.add_refs(x, refs, (H, W))
        for block in self.transformer_blocks:
            x = run_block(self, block, x, ctx, c, mask, H // p)
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, 1)          # (B,1,D) each
        x = self.proj_out(modulate(norm(x), shift, scale))                           # (B,N,p*p*C)
        return unpatchify(x, H, W, p)                                                # (B,C,H,W)
