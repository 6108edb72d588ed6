"""The model that every script trains: a diffusion transformer (DiT) and its noise schedule and
stochastic sampler. Here stands what defines the policy: rollout and gradient share these functions.
"""

import argparse
import atexit
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import count, groupby
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
import webdataset as wds
from diffusers import AutoencoderDC, AutoencoderKL
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from matplotlib import pyplot as plt
from peft import (LoraConfig, LoraModel, get_peft_model_state_dict, inject_adapter_in_model,
                  set_peft_model_state_dict)
from peft.tuners.lora import LoraLayer
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakIdKeyDictionary
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPTextModelWithProjection,
    T5EncoderModel,
)

# B batch, N image tokens, L context tokens, D width, C H W latent, h w one reference's latent size
# Flow: x_t = (1-t) x_0 + t eps, v = eps - x_0, so t = 1 is noise and t = 0 is the image.


def per_sample(t, x):
    """A float, a 0-d tensor or (B,) -> (B,) fp32 beside x. A fill, not a copy: no GPU sync."""
    if not torch.is_tensor(t):
        t = torch.full((), t, dtype=torch.float32, device=x.device)
    return t.to(x.device, torch.float32).expand(len(x))


def by_size(f, items):
    """f(batch) of every tensor, in order: those of one shape go through it together."""
    out = [None] * len(items)
    for shape in dict.fromkeys(a.shape for a in items):
        at = [i for i, a in enumerate(items) if a.shape == shape]
        for i, y in zip(at, f(torch.stack([items[i] for i in at])).unbind()):
            out[i] = y
    return out


def ragged(parts, lengths):
    """Tensors (n,D), several to a row, row b `lengths[b]` long in all -> (B,L,D), right-padded."""
    return pad_sequence(torch.cat(parts).split(lengths), batch_first=True)


# ---------------------------------------------------------------------------------------------
# MMDiT: Stable Diffusion 3's transformer. Attribute names are diffusers' parameter names, so that
# released weights load with load_state_dict(strict=True), and ours load in diffusers.


def places(rows, cols, span, D, device=None):
    """Sine-cosine codes of a grid of places whose sides are `span` units long. -> (rows*cols,D)"""
    omega = 10000 ** (-torch.arange(D // 4, dtype=torch.float64, device=device) / (D // 4))

    def side(n):
        place = torch.arange(n, device=device) / (n / span)                          # (n,)
        angle = place.double()[:, None] * omega                                      # (n,D/4)
        return torch.cat([angle.sin(), angle.cos()], 1).float()                      # (n,D/2)
    across = side(cols)[None].expand(rows, -1, -1)    # column first: diffusers names it emb_h
    down = side(rows)[:, None].expand(-1, cols, -1)
    return torch.cat([across, down], 2).flatten(0, 1)


def unpatchify(x, H, W, p):
    """Tokens (B,N,p*p*C), row by row -> (B,C,H,W) fp32."""
    x = x.view(len(x), H // p, W // p, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(x), -1, H, W).float()


class PatchEmbed(nn.Module):
    """Latent -> tokens, each with the sine-cosine code of its place."""

    def __init__(self, D, C, patch, max_size, base_size):
        super().__init__()
        self.patch, self.max_size = patch, max_size
        self.proj = nn.Conv2d(C, D, patch, stride=patch)
        # One table of max_size^2 places, `base_size` units wide; images use its middle.
        table = places(max_size, max_size, base_size, D)                             # (max^2,D)
        self.register_buffer("pos_embed", table[None])

    def forward(self, x):
        x = self.proj(x)                                                             # (B,D,H/p,W/p)
        rows, cols = x.shape[-2:]
        assert max(rows, cols) <= self.max_size, f"{rows}x{cols} patches, table has {self.max_size}"
        top, left = (self.max_size - rows) // 2, (self.max_size - cols) // 2
        table = self.pos_embed.view(self.max_size, self.max_size, -1)
        code = table[top : top + rows, left : left + cols].flatten(0, 1)             # (N,D)
        return x.flatten(2).transpose(1, 2) + code                                   # (B,N,D)


def time_wave(t):
    """Times (B,) -> 128 cosines, then 128 sines. fp32: bf16 cannot tell 993 from 996. (B,256)"""
    freq = torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))
    angle = 1000 * t[:, None] * freq                                                 # (B,128)
    return torch.cat([angle.cos(), angle.sin()], 1)


class MLP(nn.Module):
    def __init__(self, d_in, D, act=F.silu):
        super().__init__()
        self.linear_1, self.act, self.linear_2 = nn.Linear(d_in, D), act, nn.Linear(D, D)

    def forward(self, x):
        return self.linear_2(self.act(self.linear_1(x.to(self.linear_1.weight.dtype))))


class TimeTextEmbed(nn.Module):
    """What every token should know: the time, and a summary of the prompt. -> (B,D)"""

    def __init__(self, D, pooled_dim):
        super().__init__()
        self.pooled_dim = pooled_dim
        self.timestep_embedder, self.text_embedder = MLP(256, D), MLP(pooled_dim, D)

    def forward(self, t, pooled):
        if pooled is None:                # no summary = the zero vector, whose biases still count
            pooled = t.new_zeros(len(t), self.pooled_dim)
        return self.timestep_embedder(time_wave(t)) + self.text_embedder(pooled)


class AdaLN(nn.Module):
    """k modulation vectors (shift, scale, gate ...) from c = silu(time-text embedding)."""

    def __init__(self, D, k):
        super().__init__()
        self.k, self.linear = k, nn.Linear(D, k * D)

    def forward(self, c):
        return self.linear(c)[:, None].chunk(self.k, -1)                             # k x (B,1,D)


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(y, shift, scale):
    return y * (1 + scale) + shift


def run_block(dit, block, *inputs):
    """block(*inputs). With dit.checkpoint only the inputs are kept for the backward, which computes
    the rest again: one forward more, and a layer's activations at a time. There is no dropout."""
    if dit.checkpoint and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):            # the weight in x's dtype, or autocast loses the fused kernel
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def attend(q, k, v, mask):
    """softmax(q k' / sqrt(d)) v, all (B,heads,N,d); mask (B,1,1,N) True = may be attended to."""
    if q.device.type == "cpu":    # written out: the fused kernel's backward is 5 times slower there
        s = (q * q.shape[-1] ** -0.5) @ k.mT                                     # (B,heads,N,N)
        s = s if mask is None else s.masked_fill(~mask, -torch.inf)
        return s.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class FeedForward(nn.Module):
    def __init__(self, D):
        super().__init__()
        widen = nn.ModuleDict(dict(proj=nn.Linear(D, 4 * D)))
        self.net = nn.ModuleList([widen, nn.Identity(), nn.Linear(4 * D, D)])        # names: 0, 2

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class Attention(nn.Module):
    """Self-attention of the image tokens or, with `joint`, of image and context as one sequence."""

    def __init__(self, D, heads, head_dim, qk_norm, joint, last):
        super().__init__()
        self.head_dim, self.last = head_dim, last
        inner = heads * head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, D)])
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (
                nn.Linear(D, inner) for _ in range(3))
            if not last:
                self.to_add_out = nn.Linear(inner, D)

        def qk():
            return RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_q, self.norm_k = qk(), qk()
        if joint:
            self.norm_added_q, self.norm_added_k = qk(), qk()

    def heads(self, q, k, v, norm_q, norm_k):
        q, k, v = (a.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for a in (q, k, v))
        return norm_q(q), norm_k(k), v                                               # (B,heads,N,d)

    def forward(self, x, ctx=None, mask=None):
        N = x.shape[1]
        qkv = self.heads(self.to_q(x), self.to_k(x), self.to_v(x), self.norm_q, self.norm_k)
        if ctx is not None:
            added = self.heads(self.add_q_proj(ctx), self.add_k_proj(ctx), self.add_v_proj(ctx),
                               self.norm_added_q, self.norm_added_k)
            qkv = [torch.cat(pair, 2) for pair in zip(qkv, added)]                 # (B,heads,N+L,d)
        y = attend(*qkv, mask).transpose(1, 2).flatten(2)                            # (B,N+L,inner)
        x = self.to_out[0](y[:, :N])
        if ctx is None:
            return x                                                                 # (B,N,D)
        return x, None if self.last else self.to_add_out(y[:, N:])                   # + (B,L,D)


class Block(nn.Module):
    """One MMDiT block: two streams with their own weights, which meet in the attention.
    `dual`: a second attention among image tokens only. `last`: the context ends here."""

    def __init__(self, D, heads, head_dim, qk_norm, dual, last):
        super().__init__()
        self.dual, self.last = dual, last
        self.norm1 = AdaLN(D, 9 if dual else 6)
        self.norm1_context = AdaLN(D, 2 if last else 6)
        self.attn = Attention(D, heads, head_dim, qk_norm, joint=True, last=last)
        if dual:
            self.attn2 = Attention(D, heads, head_dim, qk_norm, joint=False, last=last)
        self.ff = FeedForward(D)
        if not last:
            self.ff_context = FeedForward(D)

    def forward(self, x, ctx, c, mask, x_mask):
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *extra = self.norm1(c)
        if self.last:                              # in this layer alone scale stands before shift
            c_scale, c_shift = self.norm1_context(c)
        else:
            c_shift, c_scale, c_gate, c_shift_ff, c_scale_ff, c_gate_ff = self.norm1_context(c)

        x_norm = norm(x)
        y, c_y = self.attn(modulate(x_norm, shift, scale), modulate(norm(ctx), c_shift, c_scale),
                           mask)
        x = x + gate * y
        if self.dual:
            shift2, scale2, gate2 = extra
            x = x + gate2 * self.attn2(modulate(x_norm, shift2, scale2), mask=x_mask)
        x = x + gate_ff * self.ff(modulate(norm(x), shift_ff, scale_ff))
        if not self.last:
            ctx = ctx + c_gate * c_y
            ctx = ctx + c_gate_ff * self.ff_context(modulate(norm(ctx), c_shift_ff, c_scale_ff))
        return x, ctx


class MMDiT(nn.Module):
    """SD3's multimodal DiT (Esser et al. 2024, fig. 2), SD3.5's when it has dual attention."""

    def __init__(self, sample_size=128, patch_size=2, in_channels=16, num_layers=18,
                 attention_head_dim=64, num_attention_heads=18, joint_attention_dim=4096,
                 caption_projection_dim=1152, pooled_projection_dim=2048, out_channels=16,
                 pos_embed_max_size=96, dual_attention_layers=(), qk_norm=None):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        D = num_attention_heads * attention_head_dim
        assert caption_projection_dim == D, "context and image share one attention, so one width"
        assert qk_norm in (None, "rms_norm"), f"qk_norm is None or 'rms_norm', not {qk_norm!r}"
        self.config, self.checkpoint = config, False
        self.pos_embed = PatchEmbed(D, in_channels, patch_size, pos_embed_max_size,
                                    sample_size // patch_size)
        self.time_text_embed = TimeTextEmbed(D, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, D)
        self.transformer_blocks = nn.ModuleList(
            Block(D, num_attention_heads, attention_head_dim, qk_norm,
                  dual=i in dual_attention_layers, last=i == num_layers - 1)
            for i in range(num_layers))
        self.norm_out = AdaLN(D, 2)
        self.proj_out = nn.Linear(D, patch_size**2 * out_channels)
        self.init()

    def init(self):
        """For training from scratch, as DiT does (adaLN-Zero): every gate starts at 0, so each
        block is the identity, and proj_out = 0 makes the first velocity 0, not noise."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))    # a Linear in disguise
        nn.init.zeros_(self.pos_embed.proj.bias)
        for m in [m.linear for m in self.modules() if isinstance(m, AdaLN)] + [self.proj_out]:
            nn.init.zeros_(m.weight)

    def append_refs(self, x, refs):
        """x (B,N,D) and B lists of (C,h,w) -> (B,N+most reference tokens,D), mask or None.
        As FLUX Kontext and DeepGen: a reference is more image, coded from its own centre; nothing
        but its content tells it from the target. Ragged rows are padded on the right."""
        assert len(refs) == len(x), f"{len(refs)} lists of references for a batch of {len(x)}"
        dtype = self.pos_embed.proj.weight.dtype
        tokens = by_size(lambda r: self.pos_embed(r.to(dtype)), [r for row in refs for r in row])
        rest = iter(tokens)
        rows = [[own, *(next(rest) for _ in row)] for own, row in zip(x.unbind(), refs)]
        lengths = [sum(map(len, row)) for row in rows]
        x = ragged([part for row in rows for part in row], lengths)
        if min(lengths) == max(lengths):
            return x, None
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return x, real.to(x.device)

    def forward(self, x, t, ctx, ctx_mask=None, pooled=None, refs=None):
        """Velocity at x (B,C,H,W) and t in [0,1], scalar or (B,) (diffusers' timestep / 1000).
        ctx (B,L,Dc); ctx_mask (B,L) True = real, or None if nothing is padded: the fast attention.
        pooled (B,P) or None = zeros; refs None or B lists of clean latents (C,h,w), any number and
        size. -> (B,C,H,W) fp32."""
        p, (H, W) = self.config["patch_size"], x.shape[-2:]
        dtype = self.context_embedder.weight.dtype
        assert H % p == 0 and W % p == 0, f"a {H}x{W} latent does not divide into {p}x{p} patches"
        c = F.silu(self.time_text_embed(per_sample(t, x), pooled))                   # (B,D)
        ctx = self.context_embedder(ctx.to(dtype))                                   # (B,L,D)
        x = self.pos_embed(x.to(dtype))                                              # (B,N,D)
        N, mask, x_mask = x.shape[1], None, None
        if refs is not None:
            x, x_mask = self.append_refs(x, refs)                                    # (B,N+refs,D)
        if ctx_mask is not None or x_mask is not None:         # who may be attended to, as keys
            ones = [torch.ones(a.shape[:2], dtype=torch.bool, device=x.device) for a in (x, ctx)]
            mask = torch.cat([ones[0] if x_mask is None else x_mask,
                              ones[1] if ctx_mask is None else ctx_mask.bool()], 1)
            mask = mask[:, None, None]                                               # (B,1,1,N+L)
            x_mask = None if x_mask is None else x_mask[:, None, None]
        for block in self.transformer_blocks:
            x, ctx = run_block(self, block, x, ctx, c, mask, x_mask)
        scale, shift = self.norm_out(c)                        # scale before shift here too
        x = self.proj_out(modulate(norm(x[:, :N]), shift, scale))                    # (B,N,p*p*C)
        return unpatchify(x, H, W, p)                                                # (B,C,H,W)


# ---------------------------------------------------------------------------------------------
# SanaDiT: SANA's linear transformer, under diffusers' parameter names


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
        starts them: a copy of the patch embedding, and ref_linear 0, which changes nothing yet."""
        patch = {f"ref_{k}": v for k, v in weights.items() if k.startswith("patch_embed.")}
        linear = {f"ref_linear.{k}": torch.zeros_like(p)
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


# ---------------------------------------------------------------------------------------------
# From noise to image: when to step, and how: straight, ahead of the curve, or at random


GRIDS, SOLVERS = ("uniform", "diffusers"), ("euler", "dpm")


def sigmas(steps, shift=1.0, grid="uniform"):
    """(steps+1,) times 1 ... 0, shifted towards the noise (SD3 eq. 23); both ends are exact.

    uniform    equal steps before the shift
    diffusers  what SD3.5 and most peers step on, FlowMatchEulerDiscreteScheduler's: steps - 1 such
               steps from 1 to .001, an end that is shifted twice (shift 3: .0089), and from there
               to 0. 10 steps, shift 3: it ends .4649 .2780 .0089 0, uniform .5625 .4286 .25 0"""
    def shifted(t):
        return shift * t / (1 + (shift - 1) * t)
    if grid == "uniform":
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)   # so that rounding keeps 1 at 1
    elif grid == "diffusers":
        t = F.pad(torch.linspace(1, shifted(0.001), steps, dtype=torch.float64), (0, 1))
    else:
        raise ValueError(f"grid is uniform or diffusers, not {grid!r}")
    return shifted(t).float()


def train_times(n, cfg, rng):
    """(n,) times at which the preset learns the flow, shifted once as in sampling."""
    if cfg.t_dist == "uniform":
        t = torch.rand(n, generator=rng)
    else:
        t = torch.sigmoid(torch.randn(n, generator=rng) + cfg.t_mean)
    return cfg.train_shift * t / (1 + (cfg.train_shift - 1) * t)


def dpm_step(v, x, t, s, before=None):
    """One step t -> s < t of the ODE by DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), in the form
    of k-diffusion and diffusers. v, x (B,C,H,W); t, s floats; before: the second thing that the
    step before returned, at first None. -> x at s (B,C,H,W), (t, x0).

    Euler's step leads towards x0 = x - t v, what v believes the image is, and that belief changes
    on the way. Here half its change over the step is added, as the step before foretells it on the
    scale of lambda = log((1-t)/t), half the log-SNR. Where lambda is infinite, at t = 1 and s = 0,
    it is Euler's step. The error falls as d^2 log(1/d), d = t - s, where Euler's falls as d."""
    x0 = x - t * v
    towards = x0
    if before and before[0] < 1 and s > 0:
        last, now, then = (math.log((1 - a) / a) for a in (before[0], t, s))
        towards = x0 + (then - now) / (now - last) / 2 * (x0 - before[1])
    return torch.lerp(towards, x, s / t), (t, x0)


def sde_step(v, x, t, t_next, eta, kind="flow", x_next=None, noise=None):
    """One random step t -> t_next < t of the flow, and the log-probability of where it landed.

    v, x (B,C,H,W); t, t_next floats, 0-d or (B,); eta >= 0 scales the fresh noise, 0 = Euler.
    Draws x_next (from `noise` if given) or re-scores the one given (keep it in fp32).
    -> x_next, logp (B,), mean (B,C,H,W), std (B,1,1,1).
    logp is the *mean* over the C*H*W dimensions of the Gaussian log-density: in nats per
    dimension, so a tempered density. Steps with std 0 (eta = 0, or t_next = 0) have logp 0.

    flow   Flow-GRPO eq. 9: the SDE with g = eta sqrt(t/(1-t))
    unirl  UniRL-Zero eq. 15: the same SDE for t < 1, written with D = d eta^2 / 2; its code has
           it, unused: the trainer steps by flow
    dance  DanceGRPO: the SDE with g = eta
    cps    DeepGen eq. 6 (Flow-CPS): replaces part of the noise that x holds by fresh noise
    cps-simple   the same step; logp = -mean((x_next - mean)^2), as DeepGen's code has it
    With the exact v, the first three keep the marginals of the ODE, up to an error that falls with
    d = t - t_next (flow and unirl only as d^(eta^2) if eta < 1: the rough first step, at t = 1,
    is forgotten slowly). cps keeps the noise *level* at every step instead: its marginals are
    wrong at a fixed eta however small the step, and right only if eta shrinks as sqrt(d).
    """
    v, x = v.float(), x.float()
    t, s = (per_sample(a, x).view(-1, *[1] * (x.ndim - 1)) for a in (t, t_next))     # (B,1,1,1)
    d = t - s
    # Departs from eq. 9 and 15, which divide by 1-t = 0 at pure noise: there, and only in the
    # divisor, t_next stands for t. Anything nearer to 1 explodes (10 steps: .9931 gives -2.55 x).
    room = 1 - torch.where(t < 1, t, s)
    if kind == "flow":
        g2 = eta**2 * t / room                                                       # g^2
        mean = x * (1 - g2 * d / (2 * t)) - v * (1 + g2 * (1 - t) / (2 * t)) * d
        std = (g2 * d).sqrt()
    elif kind == "unirl":
        # UniRL-Zero's eq. 1 has the v term's sign slipped; eq. 15 (its dt = -d < 0) is right.
        D = d * eta**2 / 2
        mean = x * (1 - D / room) - v * (d + D)
        std = (2 * D * t / room).sqrt()
    elif kind == "dance":
        mean = x - v * d - eta**2 * d / (2 * t) * (x + (1 - t) * v)
        std = eta * d.sqrt()
    elif kind in ("cps", "cps-simple"):
        x0, eps = x - t * v, x + (1 - t) * v                   # what v believes x is made of
        mean = (1 - s) * x0 + s * math.cos(eta * math.pi / 2) * eps
        std = s * math.sin(eta * math.pi / 2)                  # cos^2 + sin^2 = 1: level stays s
    else:
        raise ValueError(f"kind is flow, unirl, dance, cps or cps-simple, not {kind!r}")
    # The last step adds no noise: it is the plain ODE step, and nothing to learn from. Departs from
    # the code of Flow-GRPO and UniRL-Zero, which adds a little: std .006 on their grid, .0089 -> 0.
    mean = torch.where(s > 0, mean, x - v * d)
    std = torch.where(s > 0, std, 0)
    if x_next is None:
        x_next = mean + std * (torch.randn_like(x) if noise is None else noise)
    x_next = x_next.float()

    safe = torch.where(std > 0, std, 1)       # no division by 0, not even in an unused gradient
    miss = (x_next - mean).square()
    if kind == "cps-simple":
        logp = -miss
    else:
        logp = -miss / (2 * safe**2) - safe.log() - math.log(2 * math.pi) / 2
    logp = torch.where(std > 0, logp, 0).flatten(1).mean(1)                          # (B,)
    return x_next, logp, mean, std


# ---------------------------------------------------------------------------------------------
# Presets. Dimensions stand here, so that a preset can be built without any download.


@dataclass
class Config:
    preset: str = "shapes"
    # parts in their ecosystems' formats: folders, or owner/repo[/subfolder] on the Hub
    vlm: str = ""                     # transformers: Qwen2.5-VL or InternVL3 (-hf)
    dit: str = ""                     # diffusers transformer
    vae: str = ""                     # diffusers AutoencoderKL or AutoencoderDC
    text_encoder: str = ""            # bridge `text`: open_clip folder, or an SD3 pipeline
    # bridge: from VLM hidden states to DiT context
    bridge: str = "scb"               # last | scb | lim | text
    layers: tuple = ()                # scb, lim: indices into hidden_states (0 = embeddings)
    keep: str = "all"                 # tokens the DiT sees: all (images, text, queries) | query
    n_query: int = 8                  # learnable "think" tokens at the end of the VLM's sequence
    edit_queries: bool = False        # edits have queries of their own
    vlm_dim: int = 128
    c_style: str = "ln"               # connector: ln (SigLIP's block) | rms (UniRL-Zero's)
    c_dim: int = 128                  # its width, feed-forward width, layers, heads
    c_ff: int = 512
    c_layers: int = 2
    c_heads: int = 4
    text: str = "clip"                # bridge text: clip (open_clip) | sd3 | sd3-no-t5 (zeros)
    t5_tokens: int = 256
    # what the VLM is told; {} is the prompt, {images} the references
    system: str = ""
    t2i_text: str = "Generate an image: {}"
    edit_text: str = "{images}\n{}"
    think_text: str = "Think, then generate an image: {}"    # to answer in words: see Words
    ask_text: str = "{images}{}"
    judge_text: str = "{images}Does the image match the prompt: {}?"
    suffix: str = ""                  # opens the assistant's turn, or the queries after its words
    image_tokens: tuple = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    refs: str = "both"                # who is shown an edit's images: vlm | dit | both | none
    ref_noise: float = 0.0            # share of noise in the latents that the DiT is shown
    vit_scale: float = 0.0            # a reference's size for the VLM, 1 = as it is; 0: a fixed one
    pos: str = "mrope"                # position ids: mrope | arange
    # what classifier-free guidance contrasts with
    null: str = "prompt"              # null_prompt within t2i_text (prompt), as the user's whole
    null_prompt: str = ""             # turn (turn), or zeros after the connector (zeros)
    null_edit: str = ""               # the prompt for edits, which keep their images
    # flow
    size: int = 64                    # pixels
    vae_factor: int = 4               # pixels per latent, one side
    t_dist: str = "logit-normal"      # training times: sigmoid(N(t_mean, 1)) | uniform
    t_mean: float = 0.0               # > 0 favours noisy times
    train_shift: float = 1.0          # time shift while training the flow
    sample_shift: float = 1.0
    grid: str = "uniform"             # times to step on: uniform | diffusers, see sigmas
    solver: str = "euler"             # of the ODE: euler | dpm, see dpm_step; RL steps by Euler
    mmdit: dict = field(default_factory=dict)   # the DiT's own arguments: MMDiT's
    sana: dict = field(default_factory=dict)    # or SanaDiT's
    # the paper's values for the flags of pretrain.py, sft.py and RL (there its recipe's name, and
    # what belongs to the model); None: it has no such stage
    stage1: dict | None = field(default_factory=dict)
    stage2: dict | None = field(default_factory=dict)
    stage3: dict | None = field(default_factory=dict)

    @property
    def dit_config(self):
        return self.mmdit or self.sana


PARTS = ("vlm", "dit", "vae")             # what the flags of these names replace; and --refs

# Stable Diffusion 3.5 Medium. Its VAE's own config holds the scaling: 1.5305 (z - .0609).
SD35M = dict(
    size=512, vae_factor=8, sample_shift=3.0, grid="diffusers",
    mmdit=dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24,
               attention_head_dim=64, num_attention_heads=24, caption_projection_dim=1536,
               joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=384,
               dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
)  # fmt: skip
# SANA 1.6B, on the latents of a DC-AE: .41407 z
SANA = dict(sample_size=32, patch_size=1, in_channels=32, out_channels=32, num_layers=20,
            num_attention_heads=70, attention_head_dim=32, num_cross_attention_heads=20,
            cross_attention_head_dim=112, cross_attention_dim=2240, caption_channels=2304,
            mlp_ratio=2.5)  # fmt: skip
TALK = dict(
    think_text="Write a detailed prompt for an image generator that draws what is described below. "
               "First reason about what must be seen, within <think> </think>; then give the "
               "prompt, within <answer> </answer>.\n{}",
    ask_text="{images}{}\nFirst reason within <think> </think>, then give a short answer within "
             "<answer> </answer>.",
    judge_text="{images}Does the image match the prompt: {}? Answer yes, or no and what has to "
               "change.")
QWEN_3B = dict(vlm="Qwen/Qwen2.5-VL-3B-Instruct", vlm_dim=2048, **TALK)      # 36 layers
QWEN_7B = dict(vlm="Qwen/Qwen2.5-VL-7B-Instruct", vlm_dim=3584, **TALK)      # 28 layers
# OpenUni's way to ask InternVL3 (28 layers); its ViT takes 448 x 448 pixels, whatever the image.
INTERNVL_2B = dict(
    vlm="OpenGVLab/InternVL3-2B-hf", vlm_dim=1536, keep="query", n_query=256, pos="arange", **TALK,
    image_tokens=("<img>", "<IMG_CONTEXT>", "</img>"), suffix="<img>", null="turn",
    null_prompt="Generate an image.", null_edit="Keep the image as it is.",
    c_dim=1536, c_ff=8960, c_layers=6, c_heads=24, vae_factor=32, t_dist="uniform",
    sample_shift=3.0, solver="dpm", vae="mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
)  # fmt: skip
BLURRY = ("blurry, low quality, low resolution, distorted, deformed, broken content, missing parts,"
          " damaged details, artifacts, glitch, noise, pixelated, grainy, compression artifacts, "
          "bad composition, wrong proportion, incomplete editing, unfinished, unedited areas.")
# AdamW (.9, .95), cosine, clipped at norm 1, no average of the weights.
FLOW = dict(wd=0.05, ema=0.0, eval_every=1000)
# RL: what a paper does, whichever its model, as flags of grpo.py (--recipe). Flow-GRPO trains the
# first 9 of 10 steps, 1 to .0089; the tiny one that is left also adds noise there, see sde_step.
RL = dict(T=10, grid="diffusers", window=9, window_stop=0, kind="flow", eta=0.7,
          shared_noise=False, clip=1e-4, ema=0.0)  # fmt: skip
RECIPES = {
    # What is soonest at a held-out gain in the classroom: grpo.py's own defaults.
    "fast": {},
    # Flow-GRPO's public code, config geneval_sd3. Its average, .9 every 8th update, is .987 here.
    # Departs from it: the null branch of guidance is learned through, as the policy is their sum.
    "flow-grpo": RL | dict(B=48, G=24, guidance=4.5, norm="global", updates=2, lr=3e-4, wd=1e-4,
                           beta=0.04, kl="flow-grpo", lora_rank=32, lora_alpha=64, ema=0.987,
                           eval_T=40),
    # DeepGen 1.0, tables 10 and 11: all steps but the last are random; 30 of the 50, anew in each
    # iteration, are trained. In its SFT data, too, text weighs three times: that is the folder's.
    "mr-grpo": dict(steps=1500, B=32, G=8, T=50, grid="diffusers", window=49, window_stop=0,
                    trained=30, kind="cps-simple", eta=1.0, shared_noise=True, norm="group",
                    lr=2e-6, clip=1e-4, beta=5e-7, kl="velocity", sft=1e-4, sft_batch=256, ema=0.0,
                    eval_T=50, mix="text:3,*:1",
                    reward=json.dumps({"text": "preference:0.2,clip:0.1,ocr:0.7",
                                       "*": "preference:0.7,clip:0.3"})),
    # UniRL-Zero's public code. Departs from it: there the last step is trained as well, with the
    # little noise that it adds.
    "unirl-zero": RL | dict(B=8, G=8, guidance=3.5, norm="joint", train="both", lr=1e-5, beta=4e-3,
                            kl="mean"),
    # UniPic 2.0, section 4.1, after Flow-GRPO; its guidance is not told.
    "unipic2": RL | dict(B=16, G=16, guidance=3.5, norm="joint", lr=3e-4, beta=0.04, kl="flow-grpo",
                         lora_rank=32, lora_alpha=64),
    # ParaUni, section 4.1; what it leaves open is Flow-GRPO's for PickScore. Its rewards follow one
    # another: then --reward pickscore --init of the first run's folder, then clip.
    "parauni": RL | dict(B=32, G=16, guidance=4.5, norm="global", updates=2, train="both", lr=1e-4,
                         wd=0.05, beta=0.01, kl="flow-grpo", reward="aesthetic",
                         ldam="clip:24-28,pickscore:12-23,aesthetic:12-23"),
}  # fmt: skip

PRESETS = {c.preset: c for c in (
    # The classroom: every part is the real class at small size, trained by data/shapes/prepare.py
    Config(
        preset="shapes", vlm="data/shapes/vlm", dit="data/shapes/dit", vae="data/shapes/vae",
        text_encoder="data/shapes/clip", bridge="scb", layers=(6, 4, 2), t_mean=1.2,
        sample_shift=3.0,
        mmdit=dict(sample_size=16, patch_size=4, in_channels=4, out_channels=4, num_layers=6,
                   attention_head_dim=32, num_attention_heads=4, caption_projection_dim=128,
                   joint_attention_dim=128, pooled_projection_dim=128, pos_embed_max_size=16,
                   qk_norm="rms_norm"),
    ),
    Config(
        preset="shapes-sana", vlm="data/shapes/vlm", dit="data/shapes/sana/dit",
        vae="data/shapes/vae", text_encoder="data/shapes/clip", bridge="lim",
        layers=(1, 2, 3, 4, 5, 6), keep="query", n_query=16, t_mean=1.2, sample_shift=3.0,
        sana=dict(sample_size=16, patch_size=4, in_channels=4, out_channels=4, num_layers=8,
                  num_attention_heads=4, attention_head_dim=32, num_cross_attention_heads=4,
                  cross_attention_head_dim=32, cross_attention_dim=128, caption_channels=128,
                  mlp_ratio=2.5, qk_norm="rms_norm_across_heads", ref="add"),
        stage1=dict(steps=450), stage2=dict(steps=1200), stage3=dict(init="data/shapes/sana/sft"),
    ),
    # UniRL-Zero (2510.17937), appendix A and its scripts. Bridge and DiT learn together from the
    # start: `sft.py`. References are added to the DiT's input.
    Config(
        preset="unirl-zero", **QWEN_3B, bridge="last", keep="query", n_query=256, edit_queries=True,
        dit="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers/transformer", ref_noise=0.2,
        vae="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers/vae",
        system="You are a helpful assistant.", vit_scale=672 / 1024, pos="arange", null="zeros",
        # Departs from its RL code, which words both requests a little otherwise than pretraining.
        t2i_text="Please generate image based on the following caption: {}",
        edit_text="{images}\nPlease edit the given image based on the folllowing instruction: {}.",
        c_style="rms", c_dim=2048, c_ff=4096, c_layers=12, c_heads=8,
        size=1024, vae_factor=32, sample_shift=3.0, grid="diffusers", sana=SANA | dict(ref="add"),
        stage1=None,
        stage2=FLOW | dict(init="", steps=240_000, batch=128, lr=1e-4, warmup=720, wd=0.0),
        stage3=dict(recipe="unirl-zero", init="out/sft"),
    ),
    # DeepGen 1.0, table 9 (warm-up: the table's 1%, not the text's 20,000 steps); of edits its code
    # withholds nothing.
    Config(
        preset="deepgen", **QWEN_3B, **SD35M, bridge="scb", layers=tuple(range(35, 0, -6)),
        keep="all", n_query=128, vit_scale=28 / 32, null_edit=BLURRY,
        dit="Skywork/UniPic2-SD3.5M-Kontext-2B/transformer",
        vae="Skywork/UniPic2-SD3.5M-Kontext-2B/vae",
        c_dim=2048, c_ff=11946, c_layers=6, c_heads=32, t_dist="uniform", train_shift=3.0,
        stage1=FLOW | dict(steps=200_000, batch=512, lr=1e-4, warmup=2000, edit_drop=0.0),
        stage2=FLOW | dict(steps=400_000, batch=768, lr=5e-5, warmup=4000, edit_drop=0.0,
                           vlm_lora_rank=64, vlm_lora_alpha=128, vlm_lora_dropout=0.05),
        stage3=dict(recipe="mr-grpo", init="out/sft"),
    ),
    # Flow-GRPO: RL only, on SD3.5-M as it is.
    Config(
        preset="flow-grpo", **SD35M, bridge="text", text="sd3", t5_tokens=128, refs="none",
        dit="stabilityai/stable-diffusion-3.5-medium/transformer",
        vae="stabilityai/stable-diffusion-3.5-medium/vae",
        text_encoder="stabilityai/stable-diffusion-3.5-medium",
        stage1=None, stage2=None,
        stage3=dict(recipe="flow-grpo", init="", micro=9),
    ),
    # UniPic 2.0, section 4.1: first the DiT learns to edit, and RL starts from there ...
    Config(
        preset="unipic2-kontext", **SD35M, bridge="text", text="sd3", null_edit=BLURRY, refs="dit",
        dit="Skywork/UniPic2-SD3.5M-Kontext-2B/transformer",
        vae="Skywork/UniPic2-SD3.5M-Kontext-2B/vae",
        text_encoder="Skywork/UniPic2-SD3.5M-Kontext-2B", t_dist="uniform", train_shift=3.0,
        stage1=None,
        stage2=FLOW | dict(init="", steps=200_000, batch=128, lr=4e-5, warmup=2000),
        stage3=dict(recipe="unipic2", init=""),
    ),
    # ... then a VLM learns to speak to it. Its training code is not public: times are DeepGen's.
    Config(
        preset="unipic2", **QWEN_7B, **SD35M, bridge="last", keep="query", n_query=256,
        dit="Skywork/UniPic2-Metaquery-9B/transformer", vae="Skywork/UniPic2-Metaquery-9B/vae",
        edit_text="{images}{}", vit_scale=28 / 32, pos="arange", null_edit=BLURRY,
        c_dim=1536, c_ff=8960, c_layers=24, c_heads=24, t_dist="uniform", train_shift=3.0,
        stage1=FLOW | dict(steps=500_000, batch=1024, lr=1e-4, warmup=5000),
        stage2=FLOW | dict(steps=200_000, batch=128, lr=4e-5, warmup=2000),
        stage3=dict(recipe="unipic2", init="out/sft"),
    ),
    # ParaUni, section 4.1; its code is OpenUni's, and so are steps and warm-up (in that code stage
    # 2's lr is 1e-5).
    Config(
        preset="parauni", **INTERNVL_2B, bridge="lim", layers=tuple(range(1, 29)), size=1024,
        refs="vlm",
        dit="Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers/transformer",
        sana=SANA | dict(qk_norm="rms_norm_across_heads"),
        stage1=FLOW | dict(steps=100_000, batch=512, lr=1e-4, warmup=1000),
        stage2=FLOW | dict(steps=10_000, batch=512, lr=1e-4, warmup=100),
        stage3=dict(recipe="parauni", init="out/sft"),
    ),
    # OpenUni-L-512, its configs.
    Config(
        preset="openuni", **INTERNVL_2B, bridge="last", size=512, refs="vlm",
        dit="Efficient-Large-Model/Sana_1600M_512px_diffusers/transformer",
        sana=SANA | dict(sample_size=16),
        stage1=FLOW | dict(steps=100_000, batch=512, lr=1e-4, warmup=1000),
        stage2=FLOW | dict(steps=10_000, batch=256, lr=1e-5, warmup=100),
        stage3=None,
    ),
)}  # fmt: skip


def shown(cfg):
    """Who is shown an edit's images: {"vlm", "dit"}, or one of them; or the user's error."""
    able = {"vlm"} if cfg.bridge != "text" else set()
    able |= {"dit"} if cfg.mmdit or cfg.sana.get("ref") == "add" else set()
    asked = dict(both={"vlm", "dit"}, vlm={"vlm"}, dit={"dit"}, none=set()).get(cfg.refs)
    if asked is None:
        fail(f"unknown --refs {cfg.refs!r}; there are: vlm, dit, both")
    if not asked or not asked <= able:
        fail(f"preset {cfg.preset!r} cannot edit with --refs {cfg.refs}; it can show images to: "
             f"{', '.join(sorted(able)) or 'nobody'}")
    return asked


def preset(name):
    if name not in PRESETS:
        fail(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]


# ---------------------------------------------------------------------------------------------
# Bridge: what the VLM understood -> what the DiT is conditioned on


@dataclass
class Cond:
    """A condition of B samples. Guidance is a weighted sum over several, weights adding to 1."""

    ctx: torch.Tensor                           # (B,L,Dc)
    mask: torch.Tensor | None = None            # (B,L) True = real; None: nothing is padded
    pooled: torch.Tensor | None = None          # (B,P)
    refs: list | None = None                    # B lists of clean latents (C,h,w)

    def map(self, f):
        """f of every tensor but the references, which nobody learns."""
        keep = [None if a is None else f(a) for a in (self.ctx, self.mask, self.pooled)]
        return Cond(*keep, self.refs)

    def rows(self, index):
        """index: a slice, a list, or a tensor of integers or of bools."""
        cond = self.map(lambda a: a[index])
        if self.refs is not None:
            at = index.cpu() if torch.is_tensor(index) else index
            cond.refs = [self.refs[i] for i in torch.arange(len(self.refs))[at]]
        return cond

    def repeat(self, n):
        cond = self.map(lambda a: a.repeat_interleave(n, 0))
        if self.refs is not None:
            cond.refs = [row for row in self.refs for _ in range(n)]
        return cond


END = "<|im_end|>"                             # of a turn, in the chats of Qwen2.5 and InternVL3


@dataclass
class Words:
    """What the language model said to B prompts: the actions of its policy."""

    ids: torch.Tensor                           # (B,L) right-padded
    mask: torch.Tensor                          # (B,L) True = chosen by the policy, END included
    logp: torch.Tensor                          # (B,L) fp32, tempered and untruncated; pads 0
    texts: list                                 # B str, without special tokens
    closed: torch.Tensor                        # (B,) False: cut off at the limit

    def rows(self, index):
        """index: as Cond's."""
        at = torch.arange(len(self.texts))[index.cpu() if torch.is_tensor(index) else index]
        return Words(self.ids[index], self.mask[index], self.logp[index],
                     [self.texts[i] for i in at], self.closed[index])

    def repeat(self, n):
        return self.rows(torch.arange(len(self.texts)).repeat_interleave(n))


def spans(text):
    """Words by their tags -> dict(think, answer, ok): the first closed pair of each tag, "" without
    one; ok: one <think> </think>, then one <answer> </answer>, and nothing else."""
    def first(tag):
        found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.S)
        return found[1].strip() if found else ""
    tags = re.findall("</?(?:think|answer)>", text)
    ok = tags == ["<think>", "</think>", "<answer>", "</answer>"] and re.fullmatch(
        r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", text, re.S)
    return dict(think=first("think"), answer=first("answer"), ok=bool(ok))


def answers(prompts, words):
    """What is to be drawn, by the words alone: their answers; the prompt where there is none."""
    return [spans(text)["answer"] or p for p, text in zip(prompts, words.texts, strict=True)]


def verdict(text):
    """A critique -> does it say yes (True), no (False) or neither (None); and is it well formed:
    yes, or no and a reason?"""
    says = re.match(r"\s*(yes|no)\b(\W+\w)?", text, re.IGNORECASE)
    if not says:
        return None, False
    yes = says[1].lower() == "yes"
    return yes, yes or bool(says[2])


class ConnectorLayer(nn.Module):
    """A bidirectional pre-norm encoder layer with SigLIP's names. ln: DeepGen, UniPic2, OpenUni and
    ParaUni. rms: UniRL-Zero; RMSNorm, also on each head's q and k, and a gated feed-forward."""

    def __init__(self, D, ff, heads, style):
        super().__init__()
        self.heads, self.rms = heads, style == "rms"
        Norm = RMSNorm if self.rms else nn.LayerNorm
        self.layer_norm1, self.layer_norm2 = Norm(D, eps=1e-6), Norm(D, eps=1e-6)
        self.self_attn = nn.ModuleDict(
            {k: nn.Linear(D, D) for k in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(D, ff), fc2=nn.Linear(ff, D)))
        if self.rms:
            self.self_attn.update({k: RMSNorm(D // heads, eps=1e-6) for k in ("q_norm", "k_norm")})
            self.mlp["gate"] = nn.Linear(D, ff)

    def forward(self, x, mask):
        attn, mlp = self.self_attn, self.mlp
        y = self.layer_norm1(x)
        q, k, v = (attn[n](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for n in ("q_proj", "k_proj", "v_proj"))                      # (B,heads,L,d)
        if self.rms:
            q, k = attn["q_norm"](q), attn["k_norm"](k)
        x = x + attn["out_proj"](attend(q, k, v, mask).transpose(1, 2).flatten(2))
        y = self.layer_norm2(x)
        wide = mlp["fc1"](y)                                                     # (B,L,ff)
        wide = F.silu(wide) * mlp["gate"](y) if self.rms else F.gelu(wide, approximate="tanh")
        return x + mlp["fc2"](wide)


class Bridge(nn.Module):
    """Learnable queries enter the VLM's own sequence; the connector turns hidden states to context.

    last  the last hidden state (OpenUni, UniPic2, UniRL-Zero; MetaQuery, but that its connector, 24
          layers of Qwen2 with RoPE and RMSNorm, does not exist here)
    scb   chosen layers stacked on channels (DeepGen eq. 1; its "two-layer MLP" is one Linear in the
          released code and so here)
    lim   each layer through one shared connector and LayerNorm, then the mean (ParaUni eq. 4, 5)
    text  no bridge: the DiT's own text encoder speaks (Flow-GRPO, UniPic2-Kontext)
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        if cfg.bridge == "text":
            return
        d, D = cfg.vlm_dim * (len(cfg.layers) if cfg.bridge == "scb" else 1), cfg.c_dim
        ctx_dim = cfg.mmdit["joint_attention_dim"] if cfg.mmdit else cfg.sana["caption_channels"]
        # Departs from the peers' first weights: connectors xavier or lecun with biases 0, here as
        # torch does it; UniRL-Zero's queries have std 1.
        for name in ("meta_queries", "edit_queries") if cfg.edit_queries else ("meta_queries",):
            queries = torch.randn(cfg.n_query, cfg.vlm_dim) * cfg.vlm_dim**-0.5
            self.register_parameter(name, nn.Parameter(queries))
        self.projector_1 = nn.Identity() if d == D else nn.Linear(d, D)
        self.connector = nn.ModuleDict(dict(layers=nn.ModuleList(
            ConnectorLayer(D, cfg.c_ff, cfg.c_heads, cfg.c_style) for _ in range(cfg.c_layers))))
        if cfg.c_style == "rms":
            self.connector["norm"] = RMSNorm(D, eps=1e-6)
        if cfg.mmdit:                                      # SANA takes no summary of the prompt
            self.projector_2 = nn.Linear(D, cfg.mmdit["pooled_projection_dim"])
        self.projector_3 = nn.Linear(D, ctx_dim)
        if cfg.bridge == "lim":
            self.agglayer_norm = nn.LayerNorm(ctx_dim)
        elif cfg.mmdit:                                    # as DeepGen: start from "no prompt"
            for m in (self.projector_2, self.projector_3):
                nn.init.zeros_(m.weight)
                nn.init.zeros_(m.bias)

    def forward(self, hidden, lengths, layer_noise=None):
        """hidden: the VLM's tuple of (B,L,d), right-padded; lengths: B ints, queries included.
        layer_noise (layers,) multiplies the c_i of bridge lim (ParaUni's LDAM, eq. 6)."""
        cfg, B = self.cfg, len(lengths)
        assert layer_noise is None or cfg.bridge == "lim", "only bridge lim has one c_i per layer"
        if cfg.bridge == "scb":
            h = torch.cat([hidden[i] for i in cfg.layers], -1)                   # (B,L,layers*d)
        elif cfg.bridge == "lim":
            h = torch.cat([hidden[i] for i in cfg.layers])                       # (layers*B,L,d)
        else:
            h = hidden[-1]                                                       # (B,L,d)
        lengths = lengths * (len(h) // B)
        if cfg.keep == "query":                            # the last n_query tokens of each row
            at = torch.tensor([[n - cfg.n_query + i for i in range(cfg.n_query)] for n in lengths])
            h = h.gather(1, at.to(h.device)[..., None].expand(-1, -1, h.shape[-1]))
            lengths = [cfg.n_query] * len(lengths)
        mask = None
        # Departs from DeepGen, whose connector and DiT attend to the pads (its guidance always so).
        if min(lengths) < max(lengths):                    # decided on the host: no GPU sync
            mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]   # (B,L)
            mask = mask.to(h.device)
        keys = None if mask is None else mask[:, None, None]
        x = self.projector_1(h)                                                  # (B,L,c_dim)
        for layer in self.connector["layers"]:
            x = layer(x, keys)
        if cfg.c_style == "rms":
            x = self.connector["norm"](x)
        ctx, pooled = self.projector_3(x), None                                  # (B,L,Dc)
        if cfg.bridge == "lim":
            c = self.agglayer_norm(ctx).unflatten(0, (-1, B))                    # (layers,B,L,Dc)
            if layer_noise is not None:
                layer_noise = layer_noise.to(c.device).view(-1, 1, 1, 1)
            ctx = (c if layer_noise is None else c * layer_noise).mean(0)
        if cfg.mmdit:
            # Departs from DeepGen, which averages pads too: its outputs depend on the other rows.
            real = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
            mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)      # (B,c_dim)
            pooled = self.projector_2(mean.unflatten(0, (-1, B)).mean(0)).float()
        return Cond(ctx.float(), None if mask is None else mask[:B], pooled)


class SD3Text(nn.Module):
    """SD3's own text encoders, from a pipeline's folder: CLIP-L, CLIP-G and, unless its 9 GB are
    to be saved, T5. Every prompt is padded to the same length, and the DiT attends to the pads."""

    def __init__(self, folder, t5, t5_tokens, ctx_dim, meta=False):
        super().__init__()
        self.clips = nn.ModuleList(
            pretrained(CLIPTextModelWithProjection, f"{folder}/text_encoder{i}", meta)
            for i in ("", "_2"))
        self.t5 = pretrained(T5EncoderModel, f"{folder}/text_encoder_3", meta) if t5 else None
        self.tokenizers = [] if meta else [
            AutoTokenizer.from_pretrained(folder, subfolder=f"tokenizer{i}")
            for i in ("", "_2", "_3")[: 3 if t5 else 2]]
        self.t5_tokens, self.ctx_dim = t5_tokens, ctx_dim

    @torch.no_grad()
    def forward(self, prompts):
        def ids(tokenizer, length):
            rows = token_rows(tokenizer, prompts, padding="max_length", max_length=length,
                              truncation=True)
            return torch.tensor(rows, device=self.clips[0].device)
        length = self.tokenizers[0].model_max_length                             # 77, of both CLIPs
        seen = [clip(ids(t, length), output_hidden_states=True)
                for clip, t in zip(self.clips, self.tokenizers)]
        ctx = torch.cat([s.hidden_states[-2] for s in seen], -1)                 # (B,77,2048)
        ctx = F.pad(ctx, (0, self.ctx_dim - ctx.shape[-1]))                      # (B,77,Dc)
        if self.t5:
            t5 = self.t5(ids(self.tokenizers[2], self.t5_tokens))[0]             # (B,256,Dc)
        else:
            t5 = ctx.new_zeros(len(ctx), self.t5_tokens, self.ctx_dim)
        pooled = torch.cat([s.text_embeds for s in seen], -1)                    # (B,2048)
        return Cond(torch.cat([ctx, t5], 1).float(), None, pooled.float())


def special_names(tokenizer):
    """A pattern of the names of special tokens, such as <|im_end|>. Who has such a name in a prompt
    means its letters: as a token it would end the turn, or ask for an image. One sign is no name:
    SD3's second tokenizer pads with "!"."""
    names = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    names = sorted((n for n in names if len(n) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)", re.IGNORECASE)


def token_rows(tokenizer, texts, **options):
    """Texts -> lists of tokens, by one of transformers' tokenizers; special_names are letters."""
    names = special_names(tokenizer)
    return [tokenizer(text, split_special_tokens=bool(names.search(text)), **options)["input_ids"]
            for text in texts]


def clip_words(name):
    """open_clip's tokenizer, B strings -> (B,context), to which those names are letters, too: the
    end of a text would hide what stands behind it."""
    words = open_clip.get_tokenizer(name)
    if hasattr(words, "tokenizer"):                                              # transformers'
        words.tokenizer.split_special_tokens = True
        return words
    # open_clip's own cuts a text at each underscore: a space there changes nothing but the names.
    return lambda texts: words([re.sub("(?i)(start|end)_of_text", r"\1_of _text", t)
                                for t in texts])


def draw_token(logp, u, top_p):
    """logp (B,V) and u (B,) uniform in [0,1) -> (B,) where u falls along the distribution, or along
    the likeliest tokens whose mass reaches top_p. By inversion: one number a token, not V."""
    p = logp.double().exp()
    if top_p < 1:
        sorted_p, order = p.sort(1, descending=True)
        beyond = sorted_p.cumsum(1) - sorted_p >= top_p
        p = p.masked_fill(beyond.scatter(1, order, beyond), 0)
    mass = p.cumsum(1)
    return torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True)[:, 0]


def mrope(ids, image_id, grids):
    """Qwen2.5-VL's position ids (3,L) of one row: time, row, column. Text counts on, alike in all
    three; an image's tokens share a time and count rows and columns from there; text goes on past
    the longer side. grids: (rows, columns) of each image."""
    pos, start, grids = [], 0, iter(grids)
    for is_image, run in groupby(ids, lambda i: i == image_id):
        if is_image:
            rows, columns = next(grids)
            place = torch.cartesian_prod(
                torch.arange(1), torch.arange(rows), torch.arange(columns)).T    # (3,n)
            step = max(rows, columns)
        else:
            step = len(list(run))
            place = torch.arange(step).expand(3, -1)
        pos.append(start + place)
        start += step
    return torch.cat(pos, 1)


# ---------------------------------------------------------------------------------------------
# Weights that people already have: parts in their ecosystems' folders, and adapters


def fetch(name, weights=True):
    """A local folder, or owner/repo[/subfolder] on the Hub (cached; HF_HUB_OFFLINE=1: the cache
    only) -> its Path. weights: every safetensors shard must be there, whole."""
    path = Path(name)
    if not path.is_dir():
        repo, sub = "/".join(name.split("/")[:2]), name.split("/")[2:]
        files = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
        try:
            path = Path(snapshot_download(
                repo, allow_patterns=["/".join([*sub, f]) for f in
                                      (files if weights else ["config.json"])],
                ignore_patterns=["*.fp16*", "*.bf16*"]), *sub)
        except GatedRepoError:
            fail(f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then "
                 "`hf auth login`")
        except RepositoryNotFoundError:
            fail(f"{repo} is neither a folder nor a repository on the Hub; if it is private, first "
                 "`hf auth login`")
        except LocalEntryNotFoundError:
            fail(f"{name} is not a folder, not in the Hub's cache, and the Hub is out of reach: "
                 f"`hf download {repo}` where it is not, and unset HF_HUB_OFFLINE")
        except (OSError, ValueError) as e:
            fail(f"{name} is neither a folder nor owner/repo[/subfolder] on the Hub: "
                 + str(e).strip().splitlines()[0])
    if not (path / "config.json").exists():
        inside = [f.name for f in sorted(path.glob("*/")) if (f / "config.json").exists()]
        fail(f"{name} is no model's folder: it has no config.json"
             + (f"; did you mean {name}/{inside[0]}?" if inside else ""))
    if weights:
        shards(path)
    return path


def shards(path):
    """The safetensors files of a diffusers or transformers folder, all there and whole."""
    for stem in ("diffusion_pytorch_model", "model"):
        files, index = [path / f"{stem}.safetensors"], path / f"{stem}.safetensors.index.json"
        if not files[0].exists() and index.exists():
            named = json.loads(index.read_text())["weight_map"].values()
            files = [path / f for f in sorted(set(named))]
            gone = [f.name for f in files if not f.exists()]
            if gone:
                fail(f"{path} is half-downloaded: {len(gone)} of {len(files)} shards are missing, "
                     f"first {gone[0]}; download it again")
        if files[0].exists():
            for f in files:
                read_safetensors(f, names_only=True)
            return files
    fail(f"{path} has no weights: no diffusion_pytorch_model.safetensors, no model.safetensors, "
         "nor an index of shards (the classroom's SANA: python -m data.shapes.prepare sana)")


def read_safetensors(file, names_only=False):
    """-> tensors, metadata"""
    try:
        with safe_open(file, "pt") as f:
            return {} if names_only else {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError) as e:
        fail(f"{file} cannot be read, it may be truncated ({e}): copy it again")


def must_fit(what, given, own):
    """Names and shapes agree, or one line that lists the first ten that do not."""
    wrong = [f"{k} (missing)" for k in own if k not in given]
    wrong += [f"{k} (unexpected)" for k in given if k not in own]
    wrong += [f"{k} ({list(v.shape)}, not {list(own[k].shape)})" for k, v in given.items()
              if k in own and v.shape != own[k].shape]
    differ(what, wrong)


def differ(what, wrong):
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        fail(f"{what}: {len(wrong)} keys differ, first {', '.join(wrong[:10])}{more}")


def pretrained(kind, name, meta=False, **options):
    """A part by transformers or diffusers, strictly; on the meta device from its config alone."""
    path = fetch(name, weights=not meta)
    try:
        if meta:
            with torch.device("meta"):
                if kind is AutoModelForImageTextToText:
                    return kind.from_config(AutoConfig.from_pretrained(path))
                if hasattr(kind, "load_config"):                   # diffusers
                    return kind.from_config(kind.load_config(path))
                return kind(kind.config_class.from_pretrained(path))
        part, info = kind.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        fail(f"{name} cannot be loaded as {kind.__name__}: {str(e).strip().splitlines()[0]}")
    differ(f"{name} does not fit its config.json",
           [f"{k} ({m})" for m in ("missing", "unexpected") for k in sorted(info[m + "_keys"])]
           + [f"{k[0]} (shape)" for k in sorted(info["mismatched_keys"])])
    return part


def dit_tensors(name, cfg, dit):
    """Weights of a diffusers transformer's folder, whose config.json must be the preset's. What a
    reference is added by, which diffusers does not have, starts as UniRL-Zero's."""
    path = fetch(name)
    theirs = json.loads((path / "config.json").read_text())
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in cfg.dit_config.items()}
    odd = [f"{k} {theirs[k]}, not {v}" for k, v in listed.items() if theirs.get(k, v) != v]
    if odd:
        fail(f"{name} does not fit preset {cfg.preset!r}: {'; '.join(odd)}")
    weights = {k: v.float() for f in shards(path) for k, v in read_safetensors(f)[0].items()}
    return dit.with_refs(weights) | weights if cfg.sana.get("ref") == "add" else weights


def adapter(part, rank, alpha, dropout=0.0):
    """A LoRA for a part (peft's config), or None = all of it learns. DiT: Flow-GRPO's attention
    projections, of SD3.5's second attention too, which its names leave out. VLM: every Linear and
    Embedding of the language model (DeepGen); not of the visual tower, which gets no gradient."""
    where = dict(dit=["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                      "to_add_out"],
                 vlm=r"model\.language_model\..*(embed_tokens|_proj)")
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=where[part],
                      init_lora_weights="gaussian") if rank else None


def untie(vlm):
    """An embedding that changes must not drag the output layer along, which LoRA left alone."""
    if vlm.lm_head.weight is vlm.get_input_embeddings().weight:
        vlm.lm_head.weight = nn.Parameter(vlm.lm_head.weight.clone(), requires_grad=False)
    vlm.config.tie_word_embeddings = vlm.config.get_text_config().tie_word_embeddings = False


def merge(module, config, tensors, what):
    """W += alpha/r B A, the transpose of it for an embedding. tensors: peft's names."""
    try:
        tuner = LoraModel(module, config, "default")
    except ValueError as e:
        fail(f"{what} does not fit: {str(e).splitlines()[0]}")
    must_fit(what, tensors, get_peft_model_state_dict(module, save_embedding_layers=False))
    set_peft_model_state_dict(module, tensors)
    tuner.merge_and_unload()


@contextmanager
def adapters_off(module):
    """For a while the module without its LoRA: what it was before this run."""
    layers = [m for m in module.modules() if isinstance(m, LoraLayer)]
    for m in layers:
        m.enable_adapters(False)
    try:
        yield
    finally:
        for m in layers:
            m.enable_adapters(True)


# ---------------------------------------------------------------------------------------------
# The unified model


class Unified(nn.Module):
    """VLM + bridge + DiT + VAE. Everything is frozen until a script says what learns."""

    def __init__(self, cfg, vlm, tokenizer, dit, vae, text_encoder=None, image_processor=None):
        super().__init__()
        self.cfg, self.tokenizer, self.image_processor = cfg, tokenizer, image_processor
        self.vlm, self.bridge, self.dit, self.vae = vlm, Bridge(cfg), dit, vae
        self.text_encoder = text_encoder
        self.eval().requires_grad_(False)
        self.bf16 = has_bf16()
        self.seen = WeakIdKeyDictionary()      # image: its tokens and grid, see `read`
        self.trained = set()                   # parts whose weights are no longer the preset's
        self.adapters = {}                     # part -> LoRA's config and, if merged, its tensors

    @classmethod
    def from_preset(cls, name="shapes", init=None, meta=False, seed=0, **changes):
        """Build a preset from its parts and, with `init`, what people trained on top: a checkpoint
        of ours, a diffusers transformer's folder, or a peft LoRA's, which is merged. A part is the
        one in `changes`, else the one `init` was trained with, else the preset's. seed: of the
        bridge that `init` does not bring. meta: shapes only, from config.json and the preset."""
        about = read_about(init) if init else {}
        if about.get("preset", name) != name:
            fail(f"{init} is a checkpoint of preset {about['preset']!r}, not {name!r}")
        had = {k: about[k] for k in (*PARTS, "refs") if k in about}
        cfg = replace(preset(name), **(had | changes))
        if cfg.solver not in SOLVERS:
            fail(f"unknown --solver {cfg.solver!r}; there are: {', '.join(SOLVERS)}")
        text = cfg.bridge == "text"
        for part in ("dit", "vae") + (("text_encoder",) if text else ("vlm",)):
            if cfg.preset.startswith("shapes") and not Path(getattr(cfg, part)).is_dir():
                fail(f"{getattr(cfg, part)} is missing: run from the repository's root, or make it "
                     f"with python -m data.shapes.prepare")
        config = json.loads((fetch(cfg.vae, weights=False) / "config.json").read_text())
        kinds = {k.__name__: k for k in (AutoencoderKL, AutoencoderDC)}
        if config.get("_class_name") not in kinds:
            fail(f"{cfg.vae} is a {config.get('_class_name')}, not a VAE: {' or '.join(kinds)}")
        if config["latent_channels"] != cfg.dit_config["in_channels"]:
            fail(f"{cfg.vae} makes latents of {config['latent_channels']} channels, preset "
                 f"{name!r} draws {cfg.dit_config['in_channels']}")
        vae = pretrained(kinds[config["_class_name"]], cfg.vae, meta)
        with torch.device("meta") if meta else nullcontext():
            dit = MMDiT(**cfg.mmdit) if cfg.mmdit else SanaDiT(**cfg.sana)
        tensors, loras = read_init(init, cfg, dit) if init and not meta else ({}, {})
        if not meta and not any(k.startswith("dit.") and "lora_" not in k for k in tensors):
            weights = dit_tensors(cfg.dit, cfg, dit)     # not if `init` brings a whole DiT itself
            must_fit(f"{cfg.dit} does not fit preset {name!r}", weights, dit.state_dict())
            dit.load_state_dict(weights)
        vlm = tokenizer = text_encoder = image_processor = None
        if not text:
            # Eager attention on a CPU: the fused kernel's backward is 3 times slower there.
            vlm = pretrained(AutoModelForImageTextToText, cfg.vlm, meta, dtype=torch.float32,
                             attn_implementation="sdpa" if torch.cuda.is_available() else "eager")
            lm = vlm.config.get_text_config()
            if lm.hidden_size != cfg.vlm_dim or lm.num_hidden_layers < max(cfg.layers, default=0):
                fail(f"{cfg.vlm} has {lm.num_hidden_layers} layers of width {lm.hidden_size}; "
                     f"preset {name!r} needs width {cfg.vlm_dim}, layers {cfg.layers}")
            if not meta:
                tokenizer = AutoTokenizer.from_pretrained(fetch(cfg.vlm))
                image_processor = AutoImageProcessor.from_pretrained(fetch(cfg.vlm))
        elif cfg.text == "clip":
            text_encoder = open_clip.create_model(f"local-dir:{cfg.text_encoder}")
            tokenizer = clip_words(f"local-dir:{cfg.text_encoder}")
        else:
            text_encoder = SD3Text(cfg.text_encoder, cfg.text == "sd3", cfg.t5_tokens,
                                   cfg.mmdit["joint_attention_dim"], meta)
        with seeded(seed), torch.device("meta") if meta else nullcontext():
            model = cls(cfg, vlm, tokenizer, dit, vae, text_encoder, image_processor)
        if init and not meta:
            model.load_trained(init, tensors, loras)
        return model

    @classmethod
    def load(cls, path, preset="", **changes):
        """A checkpoint of ours names its own preset: the path is enough."""
        if preset:
            return cls.from_preset(preset, path, **changes)
        about = read_about(path)
        if "preset" not in about:
            fail(f"{path} is not a checkpoint of ours and names no preset: give --preset")
        return cls.from_preset(about.pop("preset"), path, **(about | changes))

    def load_trained(self, path, tensors, loras):
        """What read_init has read of `path`, on top of the preset's parts."""
        whole = {k: v for k, v in tensors.items() if "lora_" not in k}
        parts = {k.split(".")[0] for k in whole}
        if "vlm" in parts | loras.keys():
            untie(self.vlm)
        if "dit" in parts and self.cfg.sana.get("ref") == "add":     # older ones had no references
            had = {k.removeprefix("dit."): v for k, v in whole.items() if k.startswith("dit.")}
            whole |= {f"dit.{k}": v for k, v in (self.dit.with_refs(had) | had).items()}
        must_fit(f"{path} does not fit preset {self.cfg.preset!r}", whole,
                 {k: v for k, v in self.state_dict().items() if k.split(".")[0] in parts})
        self.load_state_dict({k: v.float() for k, v in whole.items()}, strict=False)
        self.trained |= parts
        for part, config in loras.items():
            mine = {k.removeprefix(part + "."): v.float() for k, v in tensors.items()
                    if k.startswith(part + ".") and "lora_" in k}
            merge(getattr(self, part), config, mine, f"{path} does not fit the preset's {part}")
            self.adapters[part] = config, mine

    def learn(self, what, seed=0):
        """what: part -> a LoRA's config, or None: all of the part learns, of the VLM its language
        model: the eye stays as it is. -> self"""
        for part, config in what.items():
            module = getattr(self, part)
            if part in self.adapters:                # merged: now a share of the part's weights
                del self.adapters[part]
                self.trained.add(part)
            if config is None:
                whole = (module.model.language_model, module.lm_head) if part == "vlm" else [module]
                [m.requires_grad_(True) for m in whole]
                continue
            with seeded(seed):
                inject_adapter_in_model(config, module)
            self.adapters[part] = config, {}
        return self.eval()

    def slim(self, device):
        """On a GPU hold what nobody trains in bf16, as it was published. Not the VAE. -> self"""
        if self.bf16 and device.type == "cuda":
            for part in filter(None, (self.vlm, self.text_encoder, self.dit)):
                for p in part.parameters():
                    p.data = p.data if p.requires_grad else p.data.bfloat16()
        return self

    def train(self, mode=True):
        """Only a LoRA has dropout to switch on; frozen parts, T5 for one, must keep theirs off."""
        super().train(False)
        for m in self.modules():
            if isinstance(m, LoraLayer):
                m.lora_dropout.train(mode)
        return self

    @property
    def device(self):
        return next(self.dit.parameters()).device

    @property
    def vae_shift(self):
        return self.vae.config.get("shift_factor") or 0.0                        # DC-AE has none

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    # ---- text -> condition

    def encode(self, prompts, images=None, task="t2i", layer_noise=None, words=None):
        """B prompts, None being the preset's null -> Cond. images, for the tasks that look: B lists
        of uint8 (3,H,W), any number and size; without text and images, an edit's null is T2I's.
        words: what the VLM answered to `task`, read between the prompt and the queries."""
        cfg = self.cfg
        if cfg.bridge == "text":
            prompts = [p if p is not None else cfg.null_edit if of == "edit" else cfg.null_prompt
                       for p, of in zip(prompts, self.tasks(prompts, images, task))]
            with self.autocast():
                return (self.encode_text if cfg.text == "clip" else self.text_encoder)(prompts)
        return self.encode_words(prompts, images, words, task, None, layer_noise)[0]

    def encode_words(self, prompts, images, words, task="think", temperature=1.0, layer_noise=None):
        """One forward over prompt, words and queries -> Cond, and text_logp's (B,L), or None for a
        temperature of None. Where the language model learns both carry gradient into it, and so
        what is drawn teaches it through the queries (UniRL-Zero)."""
        cfg = self.cfg
        x, pos, lengths, starts = self.read(prompts, images, task, words)
        with self.autocast():
            out = self.vlm.model.language_model(
                inputs_embeds=x, position_ids=pos, attention_mask=None, use_cache=False,
                output_hidden_states=True)
            cond = self.bridge(out.hidden_states, lengths, layer_noise)
            logp = temperature and self.logp_of(words, out.last_hidden_state, starts, temperature)
        if cfg.null == "zeros" and None in prompts:
            real = torch.tensor([p is not None for p in prompts], device=self.device)
            cond.ctx = cond.ctx * real[:, None, None]
        return cond, logp

    def tasks(self, prompts, images, task):
        """Of each row; a null has none but to draw: an edit's where there are images (or only the
        DiT is shown them), else T2I's"""
        return [task if p is not None or images is None and task == "edit" else
                "edit" if images is not None and len(images[b]) else "t2i"
                for b, p in enumerate(prompts)]

    def read(self, prompts, images, task, words=None, queries=True):
        """What the VLM is to read: per row the chat, its `words` and the queries -> embeddings
        (B,L,d), position ids (3,B,L) or (B,L), each row's length, and where its words begin. The
        VLM is causal and padded on the right: no row sees another's length, and position ids are
        those of a row alone, as all peers' are."""
        cfg, b, B = self.cfg, self.bridge, len(prompts)
        lm, image_id = self.vlm.model.language_model, self.vlm.config.image_token_id
        draws, tasks = task in ("t2i", "edit"), self.tasks(prompts, images, task)
        assert (images is None) == (task in ("t2i", "think")) or task == "ask", (
            "an edit or a judgement, and nothing else, shows the VLM its images")
        if images is None or task == "edit" and cfg.refs == "dit":
            images = [()] * B
        # An image is seen once, of a group and in its lifetime: the eye does not learn.
        new = {id(i): i for row in images for i in row if i not in self.seen}
        with self.autocast():
            self.seen.update(zip(new.values(), self.see([*new.values()])))       # (tokens, grid)
        shows = [[self.seen[i] for i in row] for row in images]
        ids = [self.chat_ids(p, of, [len(t) for t, _ in show])
               for p, of, show in zip(prompts, tasks, shows, strict=True)]
        starts, marks = [len(row) for row in ids], ids
        if words is not None:
            said = [row[:n] for row, n in zip(words.ids.tolist(), words.mask.sum(1).tolist())]
            tail = self.tokenizer(cfg.suffix, add_special_tokens=False)["input_ids"]
            tail = tail * queries                                # a null's chat has ended in it
            ids = [row + own + tail * (of not in ("t2i", "edit"))
                   for row, own, of in zip(ids, said, tasks, strict=True)]
            # An image's placeholder that the LM happens to say is a token, and no image.
            marks = [row + [-1] * (len(whole) - len(row)) for row, whole in zip(marks, ids)]
        # All rows' tokens as one line, then cut into rows, each with its queries behind it.
        line, marked = (torch.tensor([i for row in rows for i in row], device=self.device)
                        for rows in (ids, marks))
        x = lm.get_input_embeddings()(line)                                      # (sum of L,d)
        if any(shows):
            tokens = torch.cat([t for show in shows for t, _ in show]).to(x.dtype)
            x = x.masked_scatter((marked == image_id)[:, None], tokens)
        parts, lengths = [[row] for row in x.split([len(row) for row in ids])], [*map(len, ids)]
        if queries:
            own = b.edit_queries if cfg.edit_queries else b.meta_queries
            [row.append(own if of in ("edit", "judge") else b.meta_queries)
             for row, of in zip(parts, tasks)]
            lengths = [n + cfg.n_query for n in lengths]
        x = ragged([part for row in parts for part in row], lengths)             # (B,L,d)
        # Explicit positions: left to itself, a VLM remembers the last image's offset. To look and
        # answer it needs its own, also where a paper draws from others.
        pos = torch.arange(x.shape[1]).expand(B, -1)                             # (B,L)
        if cfg.pos == "mrope" or not draws and any(g for show in shows for _, g in show):
            pos = pad_sequence([mrope(row + [-1] * (n - len(row)), image_id, [g for _, g in show]).T
                                for row, n, show in zip(marks, lengths, shows)], batch_first=True)
            pos = pos.permute(2, 0, 1)                                           # (3,B,L)
        return x, pos.to(self.device), lengths, starts

    def chat(self, prompt, task, lengths):
        """What the VLM reads before the queries, or before it answers; lengths: tokens of each
        image. Written out here, since the chat templates of tokenizers change."""
        cfg, draws = self.cfg, task in ("t2i", "edit")
        text, null = getattr(cfg, f"{task}_text"), cfg.null_prompt
        if prompt is None and task == "edit":
            null = cfg.null_edit
        elif prompt is None and cfg.null == "turn":
            text = "{}"
        start, pad, end = cfg.image_tokens
        images = "".join(start + pad * n + end for n in lengths)
        user = text.format(null if prompt is None else prompt, images=images)
        system = f"<|im_start|>system\n{cfg.system}{END}\n" if cfg.system else ""
        return (f"{system}<|im_start|>user\n{user}{END}\n<|im_start|>assistant\n"
                + cfg.suffix * draws)

    def chat_ids(self, prompt, task, lengths):
        """The tokens of `chat`. Of a prompt special_names are letters: what stands before and
        behind it, whose own are special, is then read apart."""
        ours = partial(self.tokenizer, add_special_tokens=False)
        if not special_names(self.tokenizer).search(prompt or ""):
            return ours(self.chat(prompt, task, lengths))["input_ids"]
        before, after = self.chat("\0", task, lengths).split("\0")
        theirs, = token_rows(self.tokenizer, [prompt], add_special_tokens=False)
        return ours(before)["input_ids"] + theirs + ours(after)["input_ids"]

    # ---- text -> words: the policy of the language model

    @torch.no_grad()
    def generate(self, prompts, images=None, task="think", limit=64, temperature=1.0, top_p=1.0,
                 keys=None, n=1):
        """n answers of at most `limit` tokens to each of B prompts, of `task` think, ask or judge
        -> Words of B n rows, a prompt's in a row. Row b's randomness comes from keys[b] alone: any
        batch, any rank, same; temperature 0: the likeliest token, log-probs of temperature 1.

        top_p narrows what is drawn, not what is logged: of a truncated distribution a token that
        later falls outside has no log-prob, and the ratio of two such policies no meaning."""
        x, pos, lengths, _ = self.read(prompts, images, task, queries=False)
        lm, tok = self.vlm.model.language_model, self.tokenizer
        keys = range(len(prompts) * n) if keys is None else keys
        u = torch.stack([torch.rand(limit, generator=keyed(k), dtype=torch.float64)
                         for k in keys]).to(self.device)                         # (B,limit)
        end, last = tok.convert_tokens_to_ids(END), torch.tensor(lengths, device=self.device) - 1
        real = torch.arange(x.shape[1], device=self.device) <= last[:, None]     # (B/n,L)
        rows = torch.arange(len(prompts), device=self.device)
        ids = torch.full(u.shape, tok.pad_token_id, device=self.device)          # (B,limit) each
        mask, logps = torch.zeros_like(ids, dtype=torch.bool), torch.zeros(u.shape).to(self.device)
        with self.autocast():
            # Prompts are read once, padded on the right; the pads in the cache stay masked. Then a
            # row is what some answers have in common so far: who has ended, and who says the same
            # as another, costs nothing more.
            out = lm(inputs_embeds=x, position_ids=pos, attention_mask=None, use_cache=True)
            cache, h = out.past_key_values, out.last_hidden_state[rows, last]            # (R,d)
            pos = pos[..., rows, last]
            going, of = torch.arange(len(u), device=self.device), rows.repeat_interleave(n)
            for i in range(limit):
                logp = (self.vlm.lm_head(h).float() / (temperature or 1)).log_softmax(1)  # (R,V)
                token = (logp.argmax(1)[of] if temperature == 0 else
                         draw_token(logp[of], u[going, i], top_p))
                ids[going, i], mask[going, i], logps[going, i] = token, True, logp[of, token]
                stay = token != end
                going = going[stay]
                if i + 1 == limit or not len(going):
                    break
                said, of = (of * logp.shape[1] + token)[stay].unique(return_inverse=True)
                row, token = said // logp.shape[1], said % logp.shape[1]                 # (R,)
                if not torch.equal(row, torch.arange(len(h), device=self.device)):
                    cache.batch_select_indices(row)
                    real, pos = real[row], pos[..., row]
                real = F.pad(real, (0, 1), value=True)
                out = lm(inputs_embeds=lm.get_input_embeddings()(token)[:, None],
                         position_ids=(pos + i + 1)[..., None], attention_mask=real,
                         past_key_values=cache, use_cache=True)
                h = out.last_hidden_state[:, 0]
        ids, mask, logps = (a[:, : i + 1].contiguous() for a in (ids, mask, logps))      # (B,L)
        closed = torch.ones(len(u), dtype=torch.bool, device=self.device)
        closed[going] = False
        return Words(ids, mask, logps, tok.batch_decode(ids, skip_special_tokens=True), closed)

    def spell(self, texts):
        """Texts as if they had been generated, with log-probs 0 -> Words. None: nothing, no END. Of
        a text's special_names are letters."""
        end = self.tokenizer.convert_tokens_to_ids(END)
        rows = token_rows(self.tokenizer, [t or "" for t in texts], add_special_tokens=False)
        ids = [torch.tensor([] if t is None else [*row, end], dtype=torch.long)
               for t, row in zip(texts, rows)]
        mask = pad_sequence([torch.ones_like(i, dtype=torch.bool) for i in ids], batch_first=True)
        ids = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return Words(ids.to(self.device), mask.to(self.device),
                     torch.zeros(ids.shape, device=self.device), list(texts),
                     torch.ones(len(ids), dtype=torch.bool, device=self.device))

    def text_logp(self, prompts, images, words, task="think", temperature=1.0):
        """Log-probs (B,L) fp32 of `words` as answers to B prompts, with gradient: of the tempered,
        untruncated distribution, one row per prompt; pads 0. What is said twice of the same prompt
        and images is read once: of short answers, most of a group."""
        said = [tuple(row[:n]) for row, n in zip(words.ids.tolist(), words.mask.sum(1).tolist())]
        shown = [()] * len(said) if images is None else [tuple(map(id, row)) for row in images]
        each = {}
        which = [each.setdefault(row, len(each)) for row in zip(prompts, shown, said)]
        first = [which.index(k) for k in range(len(each))]
        prompts, images = ([of[i] for i in first] if of else None for of in (prompts, images))
        words = words.rows(first)
        x, pos, _, starts = self.read(prompts, images, task, words, queries=False)
        with self.autocast():
            out = self.vlm.model.language_model(inputs_embeds=x, position_ids=pos,
                                                attention_mask=None, use_cache=False)
            return self.logp_of(words, out.last_hidden_state, starts, temperature)[which]

    def logp_of(self, words, hidden, starts, temperature):
        """hidden (B,N,d); row b's words begin at starts[b], each chosen from the state before it.
        Few tokens at a time, computed again by backward: the logits of all would be (B,L,V)."""
        b, i = words.mask.nonzero(as_tuple=True)                                 # (n,) each
        h = hidden[b, torch.tensor(starts, device=b.device)[b] - 1 + i]          # (n,d)

        def few(h, ids):
            logits = self.vlm.lm_head(h).float() / (temperature or 1)
            return -F.cross_entropy(logits, ids, reduction="none")
        size = max(1, 2**24 // self.vlm.lm_head.out_features)
        logp = [checkpoint(few, *part, use_reentrant=False, preserve_rng_state=False)
                for part in zip(h.split(size), words.ids[words.mask].split(size))]
        return words.logp.new_zeros(words.ids.shape).masked_scatter(words.mask, torch.cat(logp))

    def see(self, images):
        """Images, uint8 (3,H,W) -> each: the VLM's tokens (n,d), and Qwen2.5-VL's grid of them."""
        if not images:
            return []
        processor, scale = self.image_processor, self.cfg.vit_scale
        # To whole tokens, as DeepGen. Departs from UniPic2 and UniRL-Zero: bicubic, antialiased.
        if scale:
            unit = processor.patch_size * processor.merge_size
            images = [F.interpolate(i[None].float(), mode="bilinear", size=[
                max(1, round(side * scale / unit)) * unit for side in i.shape[1:]])[0]
                for i in images]
        inputs = processor(images=images, do_resize=not scale, return_tensors="pt")
        inputs.pop("num_patches", None)                    # InternVL's, of images cut to pieces
        grids = [None] * len(images)
        if "image_grid_thw" in inputs:                     # (time, rows, columns) in patches
            grids = (inputs["image_grid_thw"][:, 1:] // processor.merge_size).tolist()
        tokens = self.vlm.model.get_image_features(**inputs.to(self.device)).pooler_output
        return list(zip(tokens, grids, strict=True))

    @torch.no_grad()
    def encode_text(self, prompts):
        """As SD3: the text tower's last-but-one states as context, its sentence as pooled."""
        clip, ids = self.text_encoder, self.tokenizer(prompts)                   # (B,context)
        n = (ids != clip.text_eos_id).sum(1) + 1                                 # one end-of-text
        mask = torch.arange(int(n.max())) < n[:, None]                           # (B,L)
        L, n, mask, ids = mask.shape[1], *(a.to(self.device) for a in (n, mask, ids))
        with self.autocast():
            x = clip.token_embedding(ids[:, :L]) + clip.positional_embedding[:L]
            for block in clip.transformer.resblocks:
                last_but_one, x = x, block(x, attn_mask=clip.attn_mask[:L, :L])  # causal
            end = clip.ln_final(x[torch.arange(len(x), device=self.device), n - 1])
            pooled = end @ clip.text_projection
            return Cond(clip.ln_final(last_but_one).float(), mask, pooled.float())

    def null(self, n, images=None, task="t2i"):
        """The condition of guidance: n rows of the preset's null, which keep their images."""
        if images is None:
            return self.encode([None], task=task).repeat(n)
        return self.encode([None] * n, images, task)

    def guided(self, cond, guidance, images=None, task="t2i"):
        """Classifier-free guidance as branches for `velocity`; 1 = none, half the forwards. The
        null keeps images and references."""
        null = [] if guidance == 1 else [
            (1 - guidance, replace(self.null(len(cond.ctx), images, task), refs=cond.refs))]
        return [(guidance, cond), *null]

    def encode_edit(self, prompts, images, keys=None, task="edit", words=None):
        """B instructions (None: no text) and B lists of uint8 (3,H,W) (empty: no image) -> Cond,
        with its references in VLM and DiT as cfg.refs says. keys: see ref_latents. task judge:
        prompts whose images are drawn anew, as `words` say."""
        ways, most = shown(self.cfg), max(map(len, images), default=0)
        if "dit" in ways and self.cfg.sana and most > 1:
            fail(f"SANA adds one reference to what it draws, not {most}")
        cond = self.encode(prompts, images, task, words=words)
        if "dit" in ways:
            cond.refs = self.ref_latents(images, keys)
        return cond

    def condition(self, prompts, refs=None, words=None, keys=None):
        """What a training batch tells the DiT; its task shows in what there is: pictures (prompts
        alone), edits (and refs), thoughts (and words), reflections (both). A prompt that is
        withheld, None, takes its words along. -> Cond"""
        task, words = self.taught(prompts, refs, words)
        if refs is None:
            return self.encode(prompts, task=task, words=words)
        return self.encode_edit(prompts, refs, keys, task, words)

    def taught(self, prompts, refs, words):
        """-> task of a training batch, its texts as Words, None without."""
        if words is None:
            return "t2i" if refs is None else "edit", None
        said = [None if p is None else w for p, w in zip(prompts, words)]
        return "think" if refs is None else "judge", self.spell(said)

    def lm_loss(self, prompts, refs, words):
        """The autoregressive loss of a batch's words, mean over its tokens."""
        task, words = self.taught(prompts, refs, words)
        logp = self.text_logp(prompts, refs, words, task)                        # (B,L)
        return -logp.sum() / words.mask.sum().clamp(min=1)

    def ref_latents(self, images, keys=None):
        """B lists of uint8 (3,H,W) -> B lists of clean latents (C,h,w), those of one size encoded
        together; or with UniRL-Zero's noise, .8 z + .2 eps: row b's drawn from keys[b] alone."""
        share = self.cfg.ref_noise
        rest = iter(by_size(self.to_latents, [image for row in images for image in row]))
        refs = [[next(rest) for _ in row] for row in images]
        assert not share or keys is not None, "this preset's references are noisy: it needs keys"
        for row, k in zip(refs, keys if share else ()):
            g = keyed(~k)                            # k itself begins the image's own noise
            row[:] = [(1 - share) * z + share * torch.randn(z.shape, generator=g).to(z.device)
                      for z in row]
        return refs

    def edit_branches(self, prompts, images, guidance=1.0, image_guidance=1.0, keys=None):
        """Guidance of two kinds as branches for `velocity`, those of weight 0 left out:
        v(none) + image_guidance (v(image) - v(none)) + guidance (v(full) - v(image))."""
        n, terms = len(prompts), []
        if guidance:
            terms.append((guidance, self.encode_edit(prompts, images, keys)))
        if image_guidance != guidance:
            terms.append((image_guidance - guidance, self.encode_edit([None] * n, images, keys)))
        if image_guidance != 1:
            terms.append((1 - image_guidance, self.null(n)))
        return terms

    # ---- condition -> image

    def velocity(self, x, t, branches):
        """sum_k w_k v(x, t, cond_k), branches = [(w_k, Cond), ...] with sum w_k = 1. fp32."""
        with self.autocast():
            t = per_sample(t, x)                         # a compiled DiT would bake a number in
            return sum(w * self.dit(x, t, c.ctx, c.mask, c.pooled, c.refs) for w, c in branches)

    def noise(self, keys, size=None):
        """(B,C,H,W) standard normal, row b drawn from keys[b] alone: any batch, any rank, same.
        size: pixels of a side, or of both, (H,W)."""
        size = size or self.cfg.size
        size = size if isinstance(size, tuple) else (size, size)
        h, w = (side // self.cfg.vae_factor for side in size)
        shape = (self.cfg.dit_config["in_channels"], h, w)
        return torch.stack([torch.randn(shape, generator=keyed(k)) for k in keys]).to(self.device)

    @torch.no_grad()
    def sample(self, branches, steps, size=None, noise=None, trajectory=False, keep=None,
               solver=""):
        """Along the ODE from `noise`. -> latents (B,C,H,W), or all of them (T+1,B,C,H,W).
        keep: latents (B,C,H,W), and where (B,1,H,W) they are put back at each step's noise.
        solver: euler or dpm, see dpm_step; empty: the preset's."""
        x = self.noise(range(len(branches[0][1].ctx)), size) if noise is None else noise
        cfg, solver, before = self.cfg, solver or self.cfg.solver, None
        assert solver in SOLVERS, f"solver is euler or dpm, not {solver!r}"
        # DPM-Solver++ would look ahead too far over the long step to .0089. Departs from diffusers'
        # own table for it, the uniform one x .999, which the DiT is told cut to thousandths.
        grid = cfg.grid if solver == "euler" else "uniform"
        xs, ts = [x], sigmas(steps, cfg.sample_shift, grid).tolist()
        for t, s in zip(ts, ts[1:]):
            v = self.velocity(xs[-1], t, branches)
            if solver == "dpm":
                x, before = dpm_step(v, xs[-1], t, s, before)
            else:
                x = xs[-1] - (t - s) * v
            if keep is not None:
                x = torch.where(keep[1], torch.lerp(keep[0], xs[0], s), x)
            xs.append(x)
        return torch.stack(xs) if trajectory else xs[-1]

    @torch.no_grad()
    def draw(self, prompts, seeds, steps=10, guidance=1.0):
        """B prompts and B seeds -> uint8 (B,3,H,W)."""
        branches = self.guided(self.encode(prompts), guidance)
        return self.to_images(self.sample(branches, steps, noise=self.noise(seeds)))

    @torch.no_grad()
    def think(self, prompts, seeds, steps=10, guidance=1.0, limit=64, temperature=1.0,
              answer_only=False):
        """As draw, but that the VLM first reasons, and the DiT is told the prompt and its words, or
        the answer alone. -> uint8 (B,3,H,W), Words"""
        words = self.generate(prompts, None, "think", limit, temperature, keys=seeds)
        cond = (self.encode(answers(prompts, words)) if answer_only else
                self.encode(prompts, task="think", words=words))
        branches = self.guided(cond, guidance)
        return self.to_images(self.sample(branches, steps, noise=self.noise(seeds))), words

    @torch.no_grad()
    def edit(self, prompts, images, seeds, steps=10, guidance=1.0, image_guidance=1.0, masks=None):
        """B instructions, B lists of uint8 (3,H,W) and B seeds -> uint8 (B,3,H,W), of the first
        image's size, which all rows share. masks: B of bool (H,W), True = may change; elsewhere
        the first image stays, pixel by pixel."""
        first = torch.stack([row[0] for row in images]).to(self.device)          # (B,3,H,W)
        size, f, keep = tuple(first.shape[2:]), self.cfg.vae_factor, None
        if masks is not None:
            masks = torch.stack(list(masks)).to(self.device)[:, None]            # (B,1,H,W)
            keep = self.to_latents(first), F.max_pool2d(masks.float(), f) == 0
        branches = self.edit_branches(prompts, images, guidance, image_guidance, seeds)
        new = self.to_images(self.sample(branches, steps, noise=self.noise(seeds, size), keep=keep))
        return new if masks is None else torch.where(masks, new, first)

    @torch.no_grad()
    def reflect(self, prompts, images, seeds, rounds=1, steps=10, guidance=1.0, limit=32):
        """Judge and redraw, up to `rounds` times: B prompts, uint8 images (B,3,H,W) and B seeds ->
        the last images (B,3,H,W), and for each a list of what was said, a critique a round. Who
        says yes, or neither yes nor no, keeps the image and is not asked again. Words are the
        likeliest ones."""
        images, said, todo = images.clone(), [[] for _ in prompts], list(range(len(prompts)))
        for r in range(rounds):
            words = self.generate([prompts[b] for b in todo], [[images[b]] for b in todo], "judge",
                                  limit, 0)
            [said[b].append(text) for b, text in zip(todo, words.texts)]
            no = [i for i, text in enumerate(words.texts) if verdict(text)[0] is False]
            todo = [todo[i] for i in no]
            if not todo:
                break
            asked, shows = [prompts[b] for b in todo], [[images[b]] for b in todo]
            keys = [seeds[b] + 2**32 * r for b in todo]
            cond = self.encode_edit(asked, shows, keys, "judge", words.rows(no))
            branches = self.guided(cond, guidance, shows, "edit")
            noise = self.noise(keys, tuple(images.shape[2:]))
            images[todo] = self.to_images(self.sample(branches, steps, noise=noise)).to(images)
        return images, said

    def flow_loss(self, images, prompts, keys):
        """The flow matching loss of n pairs, as in sft.py, but that no caption is withheld. images
        uint8 (n,3,H,W); time and noise of a pair are drawn from its key alone. -> (n,)"""
        x0 = self.to_latents(images)                                             # (n,C,h,w)
        t = torch.cat([train_times(1, self.cfg, keyed(k)) for k in keys]).to(self.device)
        eps = torch.stack([torch.randn(x0.shape[1:], generator=keyed(k + 1)) for k in keys])
        eps = eps.to(self.device)
        x_t = torch.lerp(x0, eps, t.view(-1, 1, 1, 1))
        v = self.velocity(x_t, t, [(1.0, self.encode(prompts))])
        return (v - (eps - x0)).square().mean((1, 2, 3))

    # Through the VAE go 2^20 pixels at a time, 4 images of 512 x 512: all at once would need more
    # memory than the DiT's backward.

    @torch.no_grad()
    def to_latents(self, images):
        """uint8 (B,3,H,W) -> (B,C,H/f,W/f), about unit variance."""
        z = []
        for few in images.split(max(1, 2**20 // images[0, 0].numel())):
            x = few.to(self.device).float() / 127.5 - 1
            with self.autocast():
                z += self.vae.encode(x.to(memory_format=torch.channels_last), return_dict=False)
        # AutoencoderDC | KL. Departs from DeepGen, and UniPic2's edits, which sample the posterior.
        z = torch.cat([a if torch.is_tensor(a) else a.mode() for a in z])
        return (z.float() - self.vae_shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def to_images(self, z):
        """Latents -> uint8 (B,3,H,W)."""
        z, images = z / self.vae.config.scaling_factor + self.vae_shift, []
        for few in z.split(max(1, 2**20 // (z[0, 0].numel() * self.cfg.vae_factor**2))):
            with self.autocast():
                x = self.vae.decode(few.to(memory_format=torch.channels_last)).sample
            images.append(((x.float().clamp(-1, 1) + 1) * 127.5).round().byte())
        return torch.cat(images)


@torch.no_grad()
def rollout(model, guided, ts, window, args, keys):
    """G images for each of B prompts. guided: branches of their B conditions; ts: T+1 floats,
    1 ... 0; noise keyed by keys[b] = (initial noise, fresh noise), a group's images in a row.
    With shared noise a group is one image until the window tells its members apart.

    -> latents x_0 (N,C,H,W), N = B G, and the window's path: xs (w+1,N,C,H,W), old log-probs (w,N),
    fp32."""
    n = args.G if args.shared_noise else 1
    x = model.noise([initial for initial, _ in keys[::n]])                       # (N/n,C,H,W)
    rows = [(weight, c.repeat(args.G // n)) for weight, c in guided]
    xs, logps = [], []
    for k, (t, s) in enumerate(zip(ts, ts[1:])):
        if k == window[0]:
            x, rows = x.repeat_interleave(n, 0), [(weight, c.repeat(n)) for weight, c in rows]
        v = model.velocity(x, t, rows)
        if k in window:
            noise = model.noise([fresh + k for _, fresh in keys])                # (N,C,H,W)
            xs.append(x)
            x, logp, _, _ = sde_step(v, x, t, s, args.eta, args.kind, noise=noise)
            logps.append(logp)
            if k == window[-1]:
                xs.append(x)
        else:
            x = x - (t - s) * v
    return x, torch.stack(xs), torch.stack(logps)


@contextmanager
def swapped(model, ref):
    """For a while the reference policy: ref = (DiT, bridge) or (DiT, bridge, VLM) in place of those
    that learn. One whose LoRA learns is its own reference, with the LoRA switched off."""
    own = model.dit, model.bridge, model.vlm

    def put(parts):
        for name, part in zip(("dit", "bridge", "vlm"), parts):
            setattr(model, name, part)
    put(ref)
    try:
        with adapters_off(model):
            yield
    finally:
        put(own)


# ---------------------------------------------------------------------------------------------
# Run helpers: nothing below learns


def fail(message):
    """A user's error: one line, non-zero exit, nothing written."""
    sys.exit(f"error: {message}")


def has_bf16():
    """bf16 where the hardware computes in it; elsewhere it would be emulated, slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    able = torch.cpu.get_capabilities()
    return able.get("avx512_bf16", False) or able.get("amx_bf16", False)


def flag(default, help, group=""):
    """A field of a script's Args. help: what --help says of it; group: the title of the flags that
    begin with this one."""
    return field(default=default, metadata=dict(help=help, group=group))


def command_line(description):
    """A strict parser, which knows no abbreviations and takes one line for an error. Its --help is
    the description, then groups of flags: no usage, in which the few that matter would drown."""
    p = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS, add_help=False,
                                allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = fail
    return p


def check_seed(args):
    if not 0 <= getattr(args, "seed", 0) < 2**63:
        fail(f"--seed {args.seed} is not from 0 to 2**63 - 1")


def parse(Args, description, stage=None, tasks=None):
    """A dataclass of `flag`s as a command line: typos die, booleans get --no-x, all are grouped.
    Precedence: the dataclass < `tasks`[--task] < the preset's values for `stage` < its recipe's, or
    --recipe's < a flag."""
    p = group = command_line(description)
    names = ["--" + f.name.replace("_", "-") for f in fields(Args)]
    p.error = lambda message: fail(                    # one line instead of the whole usage
        message + (f"; there are: {' '.join(names)}" if "unrecognized" in message else ""))
    for f, name in zip(fields(Args), names):
        if title := f.metadata.get("group"):             # the fields that follow belong to it, too
            group = p.add_argument_group(title)
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else
                dict(type=f.type, metavar=f.type.__name__))
        default = ("off", "on")[f.default] if f.type is bool else f.default
        about = f.metadata.get("help", "") + (f" [{default}]" if default != "" else "")
        group.add_argument(name, help=about.replace("%", "%%"), **kind)
    group.add_argument("-h", "--help", action="help", help="print this text")
    p.set_defaults(**asdict(Args()))
    args = p.parse_args()

    def settle(who, values):
        lacks = ["--" + k.replace("_", "-") for k in values if k not in vars(args)]
        if lacks:
            fail(f"{who} needs {', '.join(lacks)}, which this script lacks")
        p.set_defaults(**values)
        return p.parse_args()
    if tasks:
        if args.task not in tasks:
            fail(f"unknown --task {args.task!r}; there are: {', '.join(tasks)}")
        args = settle(f"task {args.task!r}", tasks[args.task])
    if stage:
        paper = getattr(preset(args.preset), stage)
        if paper is None:
            fail(f"the paper of preset {args.preset!r} has no {stage}: see PRESETS in model.py")
        args = settle(f"preset {args.preset!r}", paper)
    if hasattr(args, "recipe"):
        if args.recipe not in RECIPES:
            fail(f"unknown recipe {args.recipe!r}; there are: {', '.join(RECIPES)}")
        args = settle(f"recipe {args.recipe!r}", RECIPES[args.recipe])
    check_seed(args)
    return Args(**vars(args))


def setup():
    """-> rank, world, device. Under torchrun: one process per GPU, or gloo on the CPU."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if cuda else 0)
    if cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ or world > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // world))  # torchrun would give each only one
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
        atexit.register(dist.destroy_process_group)   # or its threads may outlive Python and abort
    return rank, world, device if cuda else torch.device("cpu")


def all_mean(values):
    """Mean over ranks of a list of numbers; every rank calls it."""
    v = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        v = v.cuda() if dist.get_backend() == "nccl" else v
        dist.all_reduce(v)
        v /= dist.get_world_size()
    return v.tolist()


def same_start(model):
    """Every rank goes on from rank 0's weights, bit for bit; then see check_ranks."""
    if dist.is_initialized():
        for p in model.parameters():
            if p.requires_grad:
                dist.broadcast(p.detach(), 0)
    check_ranks(dict(model.named_parameters()), "before the first update")
    return model


def check_ranks(weights, when):
    """Ends the run, on every rank and in one line, if weights {name: tensor} are not finite or
    differ by a bit between ranks, which from then on would train different models."""
    bits = {2: torch.int16, 4: torch.int32}                      # by the bytes of a number
    sums = torch.stack([p.detach().flatten().view(bits[p.element_size()]).sum(dtype=torch.int64)
                        for p in weights.values()])
    broken = torch.stack([~p.isfinite().all() for p in weights.values()]).long()
    most = torch.stack([sums, -sums, broken])
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)                 # largest, and minus the smallest
    for wrong, what in ((most[2] > 0, "weights are not finite"),
                        (most[0] != -most[1], "the ranks hold different weights")):
        if wrong.any():
            name = [*weights][wrong.tolist().index(True)]
            fail(f"{what} {when}, first {name}: nothing was saved, an older checkpoint stays")


def sum_grads(params, watched=()):
    """Add gradients over ranks, once per update. No wrapper around the model: RL samples it bare
    and calls backward many times; the price is no overlap of computing and sending.
    watched: losses or ratios. One that is not finite, on one rank, makes the gradient nan on all,
    so that all leave this update out: see Finite."""
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for x in watched:
        params[0].grad += 0 * x.detach().sum()                   # 0 x inf is nan, as 0 x nan is
    if dist.is_initialized() and dist.get_world_size() > 1:
        flat = torch.cat([p.grad.flatten() for p in params])
        dist.all_reduce(flat)
        for p, g in zip(params, flat.split([p.numel() for p in params])):
            p.grad.copy_(g.view_as(p))


class Finite:
    """Decides whether an update is taken: one whose gradient norm is not finite never reaches the
    weights, and so neither the average nor a checkpoint. Gradients are summed over ranks, so that
    all ranks decide alike."""

    MOST = 5                                                     # skipped in a row, then the end

    def __init__(self):
        self.in_a_row = self.skipped = 0

    def __call__(self, step, norms, prompts):
        """norms: of an update of iteration `step`; prompts: this rank's. -> is it taken?"""
        wrong = [norm for norm in norms if not math.isfinite(norm)]
        if not wrong:
            self.in_a_row = 0
            return True
        self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
        named = ", ".join([repr(p) for p in dict.fromkeys(prompts) if p is not None][:3])
        print(f"update {step + 1} is skipped: its gradient norm is {wrong[0]:g}; prompts of rank "
              f"{os.environ.get('RANK', 0)}: {named} ... ({len(prompts)} in all)", file=sys.stderr)
        if self.in_a_row > self.MOST:
            fail(f"{self.in_a_row} updates in a row were not finite: try a lower --lr; the last "
                 "checkpoint is from before them")
        return False

    def column(self):
        """-> what a row of the log says of the updates since the row before"""
        skipped, self.skipped = self.skipped, 0
        return dict(skipped=skipped) if skipped else {}


def key(seed, step, index):
    """One integer in [0, 2^64) per (seed, step, global sample index): noise that neither ranks nor
    a restart change. torch's CPU generator heeds the low 32 bits of it; so that all of a seed
    counts, its high half is added to the low one."""
    seed = seed % 2**32 + seed // 2**32
    return ((seed * 1_000_003 + step) * 1_000_003 + index) % 2**64


def keyed(key):
    """-> a generator whose numbers come from one integer alone, of any size"""
    return torch.Generator().manual_seed(key % 2**64)


@contextmanager
def seeded(seed):
    """For a while torch's own generator starts from `seed`: what is drawn here is drawn alike on
    every rank and in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def slices(n, size):
    """Micro-batches of n rows; size 0: one of all."""
    return [slice(i, i + (size or n)) for i in range(0, n, size or n)]


def table(text, value):
    """ "a:1,b:2" -> {"a": value("1"), "b": value("2")}"""
    rows = [item.partition(":") for item in text.split(",") if item]
    return {name.strip(): value(v) for name, _, v in rows}


def span(text):
    """ "4-6" -> range(4, 7); "4" -> range(4, 5)"""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def odds(rows, mix):
    """The weight of each prompt in the draw, by its category (a row's `category` or `tag`; "*" is
    every other). {"text": 3, "*": 1}: each text prompt comes three times as often as any other
    (DeepGen's proportional sampling), whatever share of the prompts they are. -> (rows,)"""
    kinds = [row.get("category", row.get("tag")) for row in rows]
    return torch.tensor([float(mix.get(k, mix.get("*", 0))) for k in kinds])


def memory_plan(model, args, rows, reads, copies, device):
    """What a run will hold, before its weights are loaded. model: on the meta device. rows: images
    per DiT backward; reads: prompts that the VLM reads with gradient; copies: parts held twice.
    -> the plan as text, {name: parameters or bytes}"""
    cfg, vlm, d = model.cfg, model.vlm, model.dit.config
    n = {k: sum(p.numel() for p in getattr(model, k).parameters())
         for k in ("vlm", "text_encoder", "bridge", "dit", "vae") if getattr(model, k) is not None}
    n["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Bytes that a backward keeps per token, layer and width in bf16, measured (LOG.md): 85 in an
    # MMDiT, 100 in SANA, 75 in a VLM. Then the weights cast to bf16. Not counted: VAE, attention.
    text = cfg.n_query + 64 + getattr(args, "limit", 0) if vlm else cfg.t5_tokens + 77
    patches = (cfg.size // cfg.vae_factor // d["patch_size"]) ** 2
    if cfg.mmdit and (getattr(args, "edits", "") or getattr(args, "task", "") == "reflect"):
        # a reference is more image
        patches *= 2
    each = 85 * (patches + text) if cfg.mmdit else 100 * patches
    acts = each * rows * d["num_layers"] * d["num_attention_heads"] * d["attention_head_dim"]
    if getattr(args, "checkpoint", False):   # of each layer its fp32 inputs, of one layer all
        acts = int(acts * (4 / 85 + 1 / d["num_layers"]))
    if reads and vlm:
        lm = vlm.config.get_text_config()
        acts += 75 * reads * text * (lm.num_hidden_layers * lm.hidden_size
                                     + cfg.c_layers * cfg.c_dim)
    cast = [p for m in (model.dit, vlm if reads else None) if m for p in m.parameters()]
    cast = sum(2 * p.numel() for p in cast if p.dtype == torch.float32)
    acts = acts + cast if model.bf16 else int(1.4 * acts)
    size = dict(weights=sum(t.nbytes for t in {*model.parameters(), *model.buffers()}),
                gradient=4 * n["trained"], AdamW=8 * n["trained"],
                average=8 * n["trained"],                      # and what it displaces while applied
                reference=4 * sum(n[part] for part in copies), activations=acts)
    size["sum"] = sum(size.values())
    has = (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda"
           else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    said = ["parameters  " + "  ".join(f"{k} {v / 1e6:,.1f} M" for k, v in n.items()),
            "GiB, rough  " + "  ".join(f"{k} {v / 2**30:.1f}" for k, v in size.items())
            + f"  of {has / 2**30:.1f} on {device.type}"]
    if size["sum"] > has:
        less = [f"a lower --{k}" for k in ("micro", "batch") if hasattr(args, k) and acts > has / 4]
        less += ["--checkpoint"] * (not getattr(args, "checkpoint", True) and acts > has / 4)
        if getattr(args, "lora_rank", 1) == 0 and getattr(args, "train", "dit") != "bridge":
            less.append("--lora-rank 32")
        less += ["--beta 0"] if copies else []
        said.append("this does not fit: try " + (", ".join(less) or "another --preset"))
    return "\n".join(said), n | size


def start_model(args, what, rows, reads, rank, device, copies=()):
    """Plan the memory, then load what the flags ask for. what: see Unified.learn. -> model"""
    parts = given_parts(args)
    if rank == 0:
        plan = Unified.from_preset(args.preset, args.init, meta=True, **parts).learn(what)
        print(memory_plan(plan.slim(device), args, rows, reads, copies, device)[0])
    model = Unified.from_preset(args.preset, args.init, seed=args.seed, **parts)
    return same_start(model.learn(what, args.seed).slim(device).to(device))


def given_parts(args):
    """--vlm, --dit, --vae, --refs, --solver, where given: in place of the preset's."""
    return {k: getattr(args, k) for k in (*PARTS, "refs", "solver") if getattr(args, k, "")}


def open_run(out, args, resume, start, rank):
    """Make the run's folder; never write into another run's. -> folder, when the run began."""
    out, begin = Path(out), time.time()
    if (out / "log.jsonl").exists() and not resume:    # stopped before its first row: begun anew
        fail(f"{out} holds another run: choose another --out, or continue it with --resume")
    all_mean([0])                       # every rank has looked before rank 0 writes
    if rank == 0:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        write(out / "config.json", json.dumps(asdict(args), indent=1))
        print(" ".join(f"{k}={v}" for k, v in asdict(args).items()))
        if resume:    # rows later than the checkpoint will come again; the clock goes on from there
            rows = [line for line in open(out / "log.jsonl") if json.loads(line)["step"] <= start]
            write(out / "log.jsonl", "".join(rows))
            begin -= json.loads(rows[-1])["at"]
    return out, begin


def write(path, text):
    """Atomic: a reader sees the old file or the new one."""
    Path(f"{path}.tmp").write_text(text)
    os.replace(f"{path}.tmp", path)


def log(out, rank, row):
    """One dict per step, appended to log.jsonl by rank 0."""
    if rank == 0:
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")


def plot(out, *curves):
    """curves.png from log.jsonl: one panel per tuple of row names, against minutes."""
    rows = [json.loads(line) for line in open(out / "log.jsonl")]
    fig, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.2))
    for ax, names in zip(axes, curves):
        for name in names:
            seen = np.array([(r["at"] / 60, r[name]) for r in rows if r.get(name) is not None])
            n = len(seen) // 20                                  # many points: their running mean
            if len(seen):
                ax.plot(*seen.T, "-" if n > 1 else "o-", ms=3, lw=1, alpha=0.3 if n > 1 else 1,
                        label=None if n > 1 else name)
            if n > 1:
                mean = np.convolve(seen[:, 1], np.ones(n) / n, "valid")
                ax.plot(seen[n // 2 :][: len(mean), 0], mean, lw=1.5, label=name)
        ax.set_xlabel("minutes")
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(out / "curves.tmp", dpi=110, format="png")
    plt.close(fig)
    os.replace(out / "curves.tmp", out / "curves.png")


def save_checkpoint(folder, tensors, cfg, step, optim=None, dtype=torch.float32, loras=None):
    """Atomic: model.safetensors (what was trained, and the config) and the optimiser's state."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if optim is not None:
        torch.save(dict(optim, step=step), folder / "optim.tmp")
        os.replace(folder / "optim.tmp", folder / "optim.pt")
    usual = LoraConfig().to_dict()      # of a LoRA what differs from peft's defaults, which change
    loras = {part: {k: v for k, v in c.to_dict().items() if v != usual[k]}
             for part, c in (loras or {}).items()}
    # One entry: safetensors writes several in an order of its own, and equal runs give equal files.
    about = {"checkpoint": json.dumps(dict(config=asdict(cfg), step=step, loras=loras),
                                      default=sorted)}
    save_file({k: v.detach().to(dtype).contiguous() for k, v in tensors.items()},
              folder / "model.tmp", about)
    os.replace(folder / "model.tmp", folder / "model.safetensors")


def checkpoint_file(path):
    """model.safetensors of a checkpoint's folder or a run's, or None."""
    return next((f for f in (Path(path) / "model.safetensors",
                             Path(path) / "ckpt" / "model.safetensors") if f.exists()), None)


def read_about(path):
    """-> config of a checkpoint of ours, {} of what else --init takes"""
    path = Path(path)
    file = checkpoint_file(path)
    if file is None and not any((path / f"{n}config.json").exists() for n in ("", "adapter_")):
        fail(f"no checkpoint at {path}: there is no model.safetensors, nor ckpt/model.safetensors, "
             "nor a diffusers transformer's or a peft LoRA's folder")
    if file is None:
        return {}
    return described(file, read_safetensors(file, names_only=True)[1])["config"]


def described(file, metadata):
    """-> what save_checkpoint says of a checkpoint: config, loras; older files say it in parts."""
    if "checkpoint" in metadata:
        return json.loads(metadata["checkpoint"])
    if "config" not in metadata:
        fail(f"{file} is not a checkpoint of ours: it names no preset")
    return {k: json.loads(metadata.get(k, "{}")) for k in ("config", "loras")}


def read_init(path, cfg, dit):
    """-> tensors, {part: LoraConfig}. path: see Unified.from_preset"""
    path = Path(path)
    if file := checkpoint_file(path):
        tensors, metadata = read_safetensors(file)
        return tensors, {part: LoraConfig(**config)
                         for part, config in described(file, metadata)["loras"].items()}
    if not (path / "adapter_config.json").exists():
        return {f"dit.{k}": v for k, v in dit_tensors(str(path), cfg, dit).items()}, {}
    file, config = path / "adapter_model.safetensors", LoraConfig.from_pretrained(path)
    if config.peft_type != "LORA" or not file.exists():
        fail(f"{path} is no LoRA: it needs peft_type LORA, and adapter_model.safetensors")
    return {"dit." + k.removeprefix("base_model.model."): v
            for k, v in read_safetensors(file)[0].items()}, {"dit": config}


class Ema:
    """An average of the weights that learn: noisy updates, steady evaluation and checkpoints."""

    def __init__(self, params, decay):
        self.params, self.decay = params, decay                  # name -> parameter
        self.mean = {k: p.detach().clone() for k, p in params.items()}

    @torch.no_grad()
    def update(self, step):
        d = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.mean.values()), list(self.params.values()), 1 - d)

    @contextmanager
    def applied(self):
        """The model computes with the average; afterwards with its own weights again."""
        raw = {k: p.detach().clone() for k, p in self.params.items()}

        def put(weights):
            for k, p in self.params.items():
                p.copy_(weights[k])
        with torch.no_grad():
            put(self.mean)
            try:
                yield
            finally:
                put(raw)

    def save(self, out, model, step, opt):
        """The average is the checkpoint, with what --init had changed, so that it stands alone: of
        a LoRA run the LoRA, merged at load. Beside it all that --resume needs."""
        def on_disk(tensors):                                  # without peft's wrapping
            return {k.replace(".base_layer", "").replace(".default", ""): v
                    for k, v in tensors.items()}
        parts = model.trained | {k.split(".")[0] for k in self.params if "lora_" not in k}
        tied = {p.data_ptr(): k for k, p in self.params.items()}   # a weight may have two names
        tensors = {k: self.mean[tied[v.data_ptr()]].clone() if v.data_ptr() in tied else v
                   for k, v in model.state_dict().items()
                   if k.split(".")[0] in parts and "lora_" not in k}
        # A LoRA that learns, or that came with --init to a part which is otherwise the preset's
        loras = {part: (config, mine) for part, (config, mine) in model.adapters.items()
                 if not mine or part not in model.trained}
        for part, (_, mine) in loras.items():
            tensors |= {f"{part}.{k}": v for k, v in mine.items()}
        raw = {k: p.detach() for k, p in self.params.items()}
        save_checkpoint(out / "ckpt", on_disk(tensors | self.mean), model.cfg, step,
                        dict(raw=raw, mean=self.mean, opt=opt.state_dict()),
                        loras={part: config for part, (config, _) in loras.items()})

    def resume(self, out, opt):
        """Put back raw weights, average and optimiser. -> the next step."""
        file = Path(out) / "ckpt" / "optim.pt"
        if not file.exists():
            fail(f"nothing to resume: {file} is missing; start without --resume in a new --out")
        try:
            saved = torch.load(file, weights_only=True, map_location="cpu")
        except (OSError, EOFError, RuntimeError, UnpicklingError) as e:
            fail(f"{file} cannot be read, it may be truncated ({str(e).splitlines()[0]})")
        if saved["raw"].keys() != self.params.keys():
            fail(f"{file} belongs to a run that trained other weights: give the flags it had")
        opt.load_state_dict(saved["opt"])
        with torch.no_grad():
            for k, p in self.params.items():
                p.copy_(saved["raw"][k])
                self.mean[k].copy_(saved["mean"][k])
        return saved["step"]


def read_image(source):
    """A file -> PIL RGB: upright as its EXIF says, 16 bits as 8, what is transparent on white."""
    image = ImageOps.exif_transpose(Image.open(source))
    if image.mode[0] in "IF":                    # of 16 bits convert would keep what is below 256
        a = np.asarray(image)
        if image.mode == "F" or a.min() < 0 or a.max() > 65535:
            raise ValueError(f"its pixels, {a.min():g} to {a.max():g}, are neither 8 nor 16 bits")
        image = Image.fromarray((a / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)   # read_image's


def bucket(width, height, cfg):
    """Sides in pixels that keep an image's shape, at the preset's area; the DiT's multiples."""
    step = cfg.vae_factor * cfg.dit_config["patch_size"]       # pixels a side must divide into
    most = step * cfg.mmdit.get("pos_embed_max_size", 999)       # pixels that have a place
    ratio = (width / height) ** 0.5
    return tuple(min(most, max(step, round(cfg.size * r / step) * step))
                 for r in (ratio, 1 / ratio))


def to_bucket(images, cfg):
    """PIL images, the last of which decides -> uint8 (3,H,W) each: it and the first, which is what
    it was drawn from, in one bucket; further references in their own."""
    sizes = [bucket(*image.size, cfg) for image in images]
    sizes[0] = sizes[-1]
    return [torch.from_numpy(np.array(
        image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    )).permute(2, 0, 1) for image, size in zip(images, sizes)]


FORMS = {                                  # of training rows: files, the last of them drawn; texts
    "t2i": (("file_name",), ("prompt",)), "edit": (("source", "target"), ("instruction",)),
    "cot": (("file_name",), ("prompt", "reasoning")),
    "reflect": (("image", "refined"), ("prompt", "critique")),
}


def pairs(folder, cfg, n, seed, rank=0, world=1, skip=0, bad_share=0.1, form="t2i"):
    """Endless batches of (uint8 (n,3,H,W), n prompts) from what people have: a folder with
    metadata.jsonl (file_name, prompt), or WebDataset shards *.tar (png/jpg + json/txt).
    form edit: of (targets, n instructions, n lists of references) from metadata.jsonl (source, a
    file or several; target; instruction), or shards (source*.png, target.png + json); cot:
    (pictures, n prompts, n reasonings); reflect: (refined pictures, n prompts, n lists of the first
    picture, n critiques). FORMS names what their rows and shards hold.

    Aspect ratio is kept at the preset's area: each batch is of one bucket of sizes. A record that
    cannot be read is named and counted; a share of more than bad_share of them ends the run.
    A resumed run skips the batches it has seen."""
    folder, rng, good, bad, rows, buckets = Path(folder), random.Random(seed), 0, set(), [], {}
    shards = sorted(map(str, folder.glob("*.tar")))
    if not shards and not (folder / "metadata.jsonl").exists():
        fail(f"{folder} holds neither metadata.jsonl nor *.tar shards"
             + "; the classroom's: python -m data.shapes.prepare data")
    (*first, drawn), texts = FORMS[form]
    wants = [*first, drawn, *texts]

    def files(row):
        """The files of a row, what is drawn last."""
        sources = row[first[0]] if first else []
        return [*([sources] if isinstance(sources, str) else sources), row[drawn]]
    for i, line in enumerate([] if shards else (folder / "metadata.jsonl").open(), 1):
        try:
            row = json.loads(line)
            rows.append((row[drawn], [folder / f for f in files(row)], [row[k] for k in texts]))
        except (ValueError, TypeError, KeyError) as e:
            fail(f"{folder}/metadata.jsonl line {i}: no {', '.join(wants[:-1])} or {wants[-1]} "
                 f"({e!r})")

    def unreadable(name, error):
        if name not in bad:                                      # once, not in every pass
            bad.add(name)
            print(f"unreadable: {name} ({len(bad)} of {len(bad) + good}): {error}", file=sys.stderr)
        if len(bad) > bad_share * (len(bad) + good + 20):
            fail(f"{len(bad)} of {len(bad) + good} records in {folder} are unreadable")
        return True                                              # webdataset: go on

    def records():                                               # one pass over the data
        if not shards:
            yield from rng.sample(rows, len(rows))
            return
        rng.shuffle(shards)
        # Every rank reads all and takes its share below: no node splitter.
        for r in wds.WebDataset(shards, shardshuffle=False, nodesplitter=None,
                                handler=lambda e: unreadable(e.args[-1], e.args[0])
                                ).shuffle(2000, rng=rng):
            names = [k for k in sorted(r) if k.split(".")[-1] in ("png", "jpg", "jpeg", "webp")]
            try:
                about = json.loads(r["json"]) if "json" in r else {texts[0]: r["txt"].decode()}
                own = [k for k in names if "." not in k][:1]
                if first:
                    source, target = ([k for k in names if k.startswith(w)]
                                      for w in (first[0], drawn))
                    if not (source and target):
                        raise KeyError(f"{first[0]} or {drawn}")
                    own = source + target[:1]
                yield (r["__key__"], [io.BytesIO(r[k]) for k in own] or [io.BytesIO()],
                       [about[k] for k in texts])
            except (ValueError, TypeError, KeyError) as e:
                unreadable(r["__key__"], f"no {' or '.join(texts)} ({e!r})")

    def batches():
        nonlocal good, skip
        while True:
            for i, (name, sources, said) in enumerate(records()):
                if i % world != rank:
                    continue
                try:
                    images = [read_image(source) for source in sources]
                    good += 1
                except UNREADABLE as e:
                    unreadable(name, e)
                    continue
                *refs, image = to_bucket(images, cfg)
                batch = buckets.setdefault(image.shape, [])
                batch.append((image, said[0], refs, *said[1:]))
                if len(batch) == n:
                    buckets[image.shape] = []
                    if skip:
                        skip -= 1
                    else:
                        images, prompts, refs, *words = zip(*batch)
                        yield (torch.stack(images), list(prompts), *[list(refs)] * bool(first),
                               *map(list, words))
            if not good:
                fail(f"{folder} holds no image that rank {rank} of {world} could read")

    return batches()


def mixture(args, cfg, n, rank=0, world=1, start=0):
    """Endless batches of one task each, from step `start`: images, prompts, references and words,
    the last two None where the task has none. Of --data, or in a share --edit-share of the steps of
    --edits, in a share --share of --tuples for the task cot or reflect. (seed, step) alone decides
    which: ranks agree, and so does a run that resumes."""
    task = getattr(args, "task", "")
    more = dict(edit=(args.edits, args.edit_share)) if args.edits else {}
    more |= {task: (args.tuples, args.share)} if task in ("cot", "reflect") else {}

    def form(step):
        chance = random.Random(key(args.seed, step, 0)).random()
        for form, (_, share) in more.items():
            if chance < share:
                return form
            chance -= share
        return "t2i"
    done = Counter(map(form, range(start)))
    folders = {"t2i": args.data} | {k: folder for k, (folder, _) in more.items()}
    data = {k: pairs(folder, cfg, n, args.seed, rank, world, done[k], form=k)
            for k, folder in folders.items()}

    def batch(step):
        images, prompts, *rest = next(data[form(step)])
        refs = rest.pop(0) if form(step) in ("edit", "reflect") else None
        return images, prompts, refs, rest[0] if rest else None
    return map(batch, count(start))


def stop_flag():
    """SIGTERM or Ctrl-C sets it; a loop that looks at it saves and exits. A second one kills."""
    flag = []

    def stop(which, frame):
        flag.append(1)
        signal.signal(which, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return flag
