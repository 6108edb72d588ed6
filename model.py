"""The policy that every script trains: a vision-language model (VLM), a bridge and a diffusion
transformer (DiT), with the stochastic step by which it draws. Rollout and gradient share this code.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from os.path import isdir

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from common.checkpoint import read_about, read_init
from common.layers import (MLP, ConnectorLayer, RMSNorm, attend, by_size, modulate, norm,
                           per_sample, places, ragged, run_block, time_wave, unpatchify)
from common.presets import PARTS, SOLVERS, preset, reference_ways
from common.run import beside, fail, from_file, has_bf16, keyed, seeded, slices
from common.sana import SanaDiT
from common.text_encoders import clip_states, load_text_encoder
from common.weights import (attempt, dit_tensors, load_trained, load_vae, load_vlm, must_agree,
                            must_fit)
from common.words import chat_ids, decode, mrope

# B batch, N image tokens, L context tokens, D width, C H W latent, h w one reference's latent size
# Flow: x_t = (1-t) x_0 + t eps, v = eps - x_0, so t = 1 is noise and t = 0 is the image.


# ---------------------------------------------------------------------------------------------
# MMDiT: Stable Diffusion 3's transformer. Attribute names are diffusers' parameter names, so that
# released weights load with load_state_dict(strict=True), and ours load in diffusers.


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

    def forward(self, x, ctx=None, mask=None, first=True):
        N = x.shape[1]
        qkv = self.heads(self.to_q(x), self.to_k(x), self.to_v(x), self.norm_q, self.norm_k)
        if ctx is not None:
            added = self.heads(self.add_q_proj(ctx), self.add_k_proj(ctx), self.add_v_proj(ctx),
                               self.norm_added_q, self.norm_added_k)
            qkv = [torch.cat(pair, 2) for pair in zip(qkv, added)]                 # (B,heads,N+L,d)
        y = attend(*qkv, mask, first).transpose(1, 2).flatten(2)                     # (B,N+L,inner)
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
                           mask, first=x_mask is None)     # or pads stand between image and context
        x = x + gate * y
        if self.dual:
            shift2, scale2, gate2 = extra
            x = x + gate2 * self.attn2(modulate(x_norm, shift2, scale2), mask=x_mask)
        x = x + gate_ff * self.ff(modulate(norm(x), shift_ff, scale_ff))
        if not self.last:
            ctx = ctx + c_gate * c_y
            ctx = ctx + c_gate_ff * self.ff_context(modulate(norm(ctx), c_shift_ff, c_scale_ff))
        return x, ctx


# A DiT is any module with this `forward`, whose parameter names are those of its weights, and
#     latent_channels, patch_size   of the latents that it draws
#     context_dim, pooled_dim       of the condition; pooled_dim 0: no summary of the prompt
#     width                         of its tokens, for the memory plan
#     most_refs                     reference latents a sample may have: 0, 1 or None = any number
#     joint                         is the context part of its sequence? For the memory plan; True
#                                   where it says nothing
# docs/forking.md makes one of a diffusers transformer.


class MMDiT(nn.Module):
    """SD3's multimodal DiT (Esser et al. 2024, fig. 2), SD3.5's when it has dual attention."""

    most_refs, joint = None, True

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
        self.latent_channels, self.patch_size, self.width = in_channels, patch_size, D
        self.context_dim, self.pooled_dim = joint_attention_dim, pooled_projection_dim
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
# From noise to image: when to step, and how: straight, ahead of the curve, or at random


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
    logp is the *mean* over the C*H*W dimensions of the Gaussian log-density (Flow-GRPO): a sum
    would grow with the latent, and so would what --clip must be. So it is a tempered density, in
    nats per dimension. Steps with std 0 (eta or t_next 0) have logp 0.

    flow   Flow-GRPO eq. 9: the SDE with g = eta sqrt(t/(1-t))
    unirl  UniRL-Zero eq. 15: the same SDE for t < 1; its trainer steps by flow
    dance  DanceGRPO: the SDE with g = eta
    cps    DeepGen eq. 6 (Flow-CPS): replaces part of the noise that x holds by fresh noise
    cps-simple   the same step; logp = -mean((x_next - mean)^2), as DeepGen's code: not in nats
    With the exact v, the first three keep the marginals of the ODE, up to an error that falls with
    d = t - t_next (flow and unirl only as d^(eta^2) if eta < 1: the rough first step, at t = 1,
    is forgotten slowly). cps keeps the noise *level* at every step instead: its marginals are
    wrong at a fixed eta however small the step, and right only if eta shrinks as sqrt(d).
    """
    v, x = v.float(), x.float()
    t, s = (per_sample(a, x).view(-1, *[1] * (x.ndim - 1)) for a in (t, t_next))     # (B,1,1,1)
    d = t - s
    # Departs from eq. 9 and 15, which divide by 1-t = 0 at pure noise: in the divisor t_next then
    # stands for t. With UniRL-Zero's .9931 for t a step of .1 at eta .7 multiplies x by -2.55.
    room = 1 - torch.where(t < 1, t, s)
    if kind == "flow":
        g2 = eta**2 * t / room                                                       # g^2
        mean = x * (1 - g2 * d / (2 * t)) - v * (1 + g2 * (1 - t) / (2 * t)) * d
        std = (g2 * d).sqrt()
    elif kind == "unirl":
        # UniRL-Zero's eq. 1 has the v term's sign slipped; eq. 15 (its dt = -d < 0) is right.
        half = d * eta**2 / 2
        mean = x * (1 - half / room) - v * (d + half)
        std = (2 * half * t / room).sqrt()
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


    @staticmethod
    def cat(parts):
        """Conditions without references, of one part of the rows after another."""
        masks = [c.mask for c in parts]
        if any(mask is not None for mask in masks):          # another part may have no pads
            masks = [torch.ones_like(c.ctx[..., 0], dtype=torch.bool) if c.mask is None else c.mask
                     for c in parts]
        every = [c.ctx for c in parts], masks, [c.pooled for c in parts]
        return Cond(*(None if some[0] is None else torch.cat(some) for some in every))


class Branches(list):
    """Conditions of B rows under guidance: [(weight, Cond), ...], weights adding to 1, whose
    velocities are summed: v = sum_k w_k v(x, t, c_k)."""

    def map(self, f):
        return Branches((weight, f(cond)) for weight, cond in self)

    def rows(self, index):
        """index: as Cond's."""
        return self.map(lambda cond: cond.rows(index))

    def repeat(self, n):
        return self.map(lambda cond: cond.repeat(n))

    def leaf(self):
        """A copy of the same values without their graph, which needs gradients where they do. The
        micro-batches of an update add up their gradients on it; then one backward (pull) carries
        the sum on into the bridge and the language model, which so are computed once."""
        return self.map(lambda cond: cond.map(
            lambda a: a.detach().requires_grad_(a.requires_grad)))

    def pull(self, leaf, loss=None):
        """One backward from the gradients that `leaf`, a copy of these, has added up, and from
        `loss`, into the bridge and the language model. It does nothing where neither learns."""
        ends = [] if loss is None else [(loss, None)]
        for (_, cond), (_, cut) in zip(self, leaf):
            for a, b in ((cond.ctx, cut.ctx), (cond.pooled, cut.pooled)):
                if a is not None and a.requires_grad and b.grad is not None:
                    ends.append((a, b.grad))
        if ends:
            tensors, gradients = zip(*ends)
            torch.autograd.backward(tensors, gradients)


@dataclass(eq=False)
class Look:
    """A picture and what the VLM sees of it. The VLM's visual tower never learns, so that a picture
    is looked at once and remembered by whoever holds this: see Unified.look."""

    image: torch.Tensor                         # uint8 (3,H,W)
    tokens: torch.Tensor                        # (n,d)
    grid: list | None                           # Qwen2.5-VL's (rows, columns) of the tokens


class Bridge(nn.Module):
    """Learnable queries enter the VLM's own sequence; the connector turns hidden states to context.

    last  the last hidden state (OpenUni, UniPic2, UniRL-Zero; MetaQuery, but that its connector, 24
          layers of Qwen2 with RoPE and RMSNorm, does not exist here)
    scb   chosen layers stacked on channels (DeepGen eq. 1; its "two-layer MLP" is one Linear in the
          released code and so here)
    lim   each layer through one shared connector and LayerNorm, then the mean (ParaUni eq. 4, 5)
    text  no bridge: the DiT's own text encoder speaks (Flow-GRPO, UniPic2-Kontext)
    """

    def __init__(self, cfg, dit):
        super().__init__()
        self.cfg, self.pooled_dim = cfg, dit.pooled_dim
        if cfg.bridge == "text":
            return
        d, D = cfg.vlm_dim * (len(cfg.layers) if cfg.bridge == "scb" else 1), cfg.c_dim
        # Departs from the peers' first weights: connectors xavier or lecun with biases 0, here as
        # torch does it; UniRL-Zero's queries have std 1.
        for name in ("meta_queries", "edit_queries") if cfg.edit_queries else ("meta_queries",):
            queries = torch.randn(cfg.n_query, cfg.vlm_dim) * cfg.vlm_dim**-0.5
            self.register_parameter(name, nn.Parameter(queries))
        # DeepGen's names. 1: to the connector's width; 2: to the summary; 3: to the context
        self.projector_1 = nn.Identity() if d == D else nn.Linear(d, D)
        self.connector = nn.ModuleDict(dict(layers=nn.ModuleList(
            ConnectorLayer(D, cfg.c_ff, cfg.c_heads, cfg.c_style) for _ in range(cfg.c_layers))))
        if cfg.c_style == "rms":
            self.connector["norm"] = RMSNorm(D, eps=1e-6)
        if dit.pooled_dim:                                 # SANA takes no summary of the prompt
            self.projector_2 = nn.Linear(D, dit.pooled_dim)
        self.projector_3 = nn.Linear(D, dit.context_dim)
        if cfg.bridge == "lim":
            self.agglayer_norm = nn.LayerNorm(dit.context_dim)
        elif dit.pooled_dim:                                 # as DeepGen: start from "no prompt"
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
        layers = len(h) // B                               # of lim, one after another; else 1
        lengths = list(lengths) * layers                   # the same B lengths once more for each
        if cfg.keep == "query":                            # the last n_query tokens of each row
            at = torch.tensor([[n - cfg.n_query + i for i in range(cfg.n_query)] for n in lengths])
            at = at.to(h.device, non_blocking=True)[..., None]
            h = h.gather(1, at.expand(-1, -1, h.shape[-1]))
            lengths = [cfg.n_query] * len(lengths)
        mask = None
        # Departs from DeepGen, whose connector and DiT attend to the pads (its guidance always so).
        if min(lengths) < h.shape[1]:                      # decided on the host: no GPU sync
            mask = torch.arange(h.shape[1]) < torch.tensor(lengths)[:, None]     # (B,L)
            mask = mask.to(h.device, non_blocking=True)
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
        if self.pooled_dim:
            # Departs from DeepGen, which averages pads too: its outputs depend on the other rows.
            real = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)
            mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)      # (B,c_dim)
            pooled = self.projector_2(mean.unflatten(0, (-1, B)).mean(0)).float()
        return Cond(ctx.float(), None if mask is None else mask[:B], pooled)


# ---------------------------------------------------------------------------------------------
# The unified model


def build_dit(cfg, empty=False):
    """The preset's DiT, with random weights; empty: without memory, until its weights come"""
    device = torch.device("meta") if empty else nullcontext()
    if cfg.dit_class:                                # somebody's own, such as my_dit.py:MyDiT
        try:
            kind = from_file(cfg.dit_class)          # before: what its file computes needs memory
            with device:
                return kind(**cfg.dit_args)
        except ValueError as e:
            fail(e)
    with device:
        return attempt(f"the DiT of preset {cfg.preset!r} cannot be built", lambda: (
            MMDiT(**cfg.mmdit) if cfg.mmdit else SanaDiT(**cfg.sana)))


class Unified(nn.Module):
    """VLM + bridge + DiT + VAE. Everything is frozen until a script says what learns."""

    def __init__(self, cfg, vlm, tokenizer, dit, vae, text_encoder=None, image_processor=None):
        super().__init__()
        self.cfg, self.tokenizer, self.image_processor = cfg, tokenizer, image_processor
        self.vlm, self.bridge, self.dit, self.vae = vlm, Bridge(cfg, dit), dit, vae
        self.text_encoder = text_encoder
        self.eval().requires_grad_(False)
        self.bf16 = has_bf16()
        self.trained = set()                   # parts whose weights are no longer the preset's
        self.adapters = {}                     # part -> LoRA's config and, if merged, its tensors

    @classmethod
    def from_preset(cls, name="shapes", init=None, meta=False, seed=0, **changes):
        """Build a preset from its parts and, with `init`, what people trained on top: a checkpoint
        of ours, a diffusers transformer's folder, or a LoRA's of peft or diffusers, which is
        merged; or owner/repo[/subfolder] on the Hub that holds one of them. A part is the one in
        `changes`, else the one `init` was trained with, else the preset's. seed: of the bridge that
        `init` does not bring. meta: shapes only, from config.json and the preset."""
        about = read_about(init) if init else {}
        if about.get("preset", name) != name:
            fail(f"{init} is a checkpoint of preset {about['preset']!r}, not {name!r}")
        had = {k: about[k] for k in (*PARTS, "refs") if k in about}
        cfg = replace(preset(name), **(had | changes))
        if cfg.solver not in SOLVERS:
            fail(f"unknown --solver {cfg.solver!r}; there are: {', '.join(SOLVERS)}")
        text = cfg.bridge == "text"
        for part in ("dit", "vae", "text_encoder" if text else "vlm"):
            if getattr(cfg, part).startswith("data/shapes/") and not isdir(
                    beside(getattr(cfg, part))):
                fail(f"{getattr(cfg, part)} is missing: make it with python -m data.shapes.prepare")
        # To fill 2 billion weights with chance, only to replace them, takes long, and room.
        dit = build_dit(cfg, empty=meta or not cfg.dit_class)
        vae = load_vae(cfg, dit, meta)
        tensors, loras = read_init(init, cfg, dit) if init and not meta else ({}, {})
        must_agree(init, tensors, about, changes)
        if not meta and not any(k.startswith("dit.") and "lora_" not in k for k in tensors):
            weights = dit_tensors(cfg.dit, cfg, dit)     # not if `init` brings a whole DiT itself
            must_fit(f"{cfg.dit} does not fit preset {name!r}", weights, dit.state_dict())
            dit.load_state_dict(weights, assign=not cfg.dit_class)   # there two may be one weight
        vlm = tokenizer = text_encoder = image_processor = None
        if text:
            text_encoder, tokenizer = load_text_encoder(cfg, dit, meta)
        else:
            vlm, tokenizer, image_processor = load_vlm(cfg, meta)
        with seeded(seed), torch.device("meta") if meta else nullcontext():
            model = cls(cfg, vlm, tokenizer, dit, vae, text_encoder, image_processor)
        if init and not meta:
            load_trained(model, init, tensors, loras)
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
                if cfg.text == "clip":
                    return Cond(*clip_states(self.text_encoder, self.tokenizer, prompts,
                                             self.device))
                return Cond(*self.text_encoder(prompts))
        return self.encode_words(prompts, images, words, task, None, layer_noise)[0]

    def encode_words(self, prompts, images, words, task="think", temperature=1.0, layer_noise=None):
        """One pass over prompt, words and queries -> Cond, and text_logp's (B,L), or None for a
        temperature of None. Where the language model learns both carry gradient into it, and so
        what is drawn teaches it through the queries (UniRL-Zero). Without a gradient, whose memory
        --micro bounds, rows of more than 2^29 numbers in all layers, some 6 GB, go part after
        part."""
        cfg, lm = self.cfg, self.vlm.model.language_model
        x, pos, lengths, starts = self.sequence(prompts, images, task, words)
        few = max(1, 2**29 // (x[0].numel() * len(lm.layers)))
        parts = []
        with self.autocast():
            for i in slices(len(x), 0 if torch.is_grad_enabled() else few):
                out = lm(inputs_embeds=x[i], position_ids=pos[..., i, :], attention_mask=None,
                         use_cache=False, output_hidden_states=True)
                logp = None if temperature is None else self.logp_of(
                    words.rows(i), out.last_hidden_state, starts[i], temperature)
                parts.append((self.bridge(out.hidden_states, lengths[i], layer_noise), logp))
        conds, logps = zip(*parts)
        cond, logp = Cond.cat(conds), None if temperature is None else torch.cat(logps)
        if cfg.null == "zeros" and None in prompts:
            real = torch.tensor([p is not None for p in prompts])[:, None, None]
            cond.ctx = cond.ctx * real.to(self.device, non_blocking=True)
        return cond, logp

    def tasks(self, prompts, images, task):
        """The task of each row. With a prompt it is `task`. A null (None) is only drawn from: as an
        edit if its row has images (or if only the DiT is shown some: images None), else as T2I"""
        def of_null(b):
            edits = task == "edit" if images is None else len(images[b])
            return "edit" if edits else "t2i"
        return [of_null(b) if p is None else task for b, p in enumerate(prompts)]

    def sequence(self, prompts, images, task, words=None, queries=True):
        """What the VLM is to read: per row the chat, its `words` and the queries -> embeddings
        (B,L,d), position ids (3,B,L) or (B,L), each row's length, and where its words begin. The
        VLM is causal and padded on the right: no row sees another's length, and position ids are
        those of a row alone, as all peers' are."""
        cfg, b, B = self.cfg, self.bridge, len(prompts)
        lm, image_id = self.vlm.model.language_model, self.vlm.config.image_token_id
        draws, tasks = task in ("t2i", "edit"), self.tasks(prompts, images, task)
        assert (images is None) == (task in ("t2i", "think")) or task == "answer", (
            "an edit or a critique, and nothing else, shows the VLM its images")
        if images is None or task == "edit" and cfg.refs == "dit":
            images = [()] * B
        shows = [[(look.tokens, look.grid) for look in row] for row in self.look(images)]
        ids = [chat_ids(cfg, self.tokenizer, p, of, [len(t) for t, _ in show])
               for p, of, show in zip(prompts, tasks, shows, strict=True)]
        starts, marks = [len(row) for row in ids], ids
        if words is not None:
            said = [row[:n] for row, n in zip(words.ids.tolist(), words.mask.sum(1).tolist())]
            tail = self.tokenizer(cfg.suffix, add_special_tokens=False)["input_ids"]
            tail = tail if queries else []
            # The chat of a null ends in the tail already.
            ids = [row + own + ([] if of in ("t2i", "edit") else tail)
                   for row, own, of in zip(ids, said, tasks, strict=True)]
            # An image's placeholder that the LM happens to say is a token, and no image.
            marks = [row + [-1] * (len(whole) - len(row)) for row, whole in zip(marks, ids)]
        # All rows' tokens as one line, then cut into rows, each with its queries behind it.
        line, marked = (torch.tensor([i for row in rows for i in row]) for rows in (ids, marks))
        line, marked = (a.to(self.device, non_blocking=True) for a in (line, marked))
        x = lm.get_input_embeddings()(line)                                      # (sum of L,d)
        if any(shows):
            tokens = torch.cat([t for show in shows for t, _ in show]).to(x.dtype)
            x = x.masked_scatter((marked == image_id)[:, None], tokens)
        parts, lengths = [[row] for row in x.split([len(row) for row in ids])], [*map(len, ids)]
        if queries:
            own = b.edit_queries if cfg.edit_queries else b.meta_queries
            for row, of in zip(parts, tasks):
                row.append(own if of in ("edit", "critique") else b.meta_queries)
            lengths = [n + cfg.n_query for n in lengths]
        x = ragged([part for row in parts for part in row], lengths)             # (B,L,d)
        # Explicit positions: left to itself, a VLM remembers the last image's offset. To look and
        # answer it needs its own, also where a paper draws from others.
        pos = torch.arange(x.shape[1]).expand(B, -1)                             # (B,L)
        if cfg.pos == "mrope" or not draws and any(g for show in shows for _, g in show):
            pos = pad_sequence([mrope(row + [-1] * (n - len(row)), image_id, [g for _, g in show]).T
                                for row, n, show in zip(marks, lengths, shows)], batch_first=True)
            pos = pos.permute(2, 0, 1)                                           # (3,B,L)
        return x, pos.to(self.device, non_blocking=True), lengths, starts

    # ---- text -> words: the policy of the language model

    @torch.no_grad()
    def generate(self, prompts, images=None, task="think", limit=64, temperature=1.0, top_p=1.0,
                 keys=None, n=1):
        """n answers of at most `limit` tokens to each of B prompts, of `task` think, answer or
        critique -> Words of B n rows, a prompt's in a row. Row b's randomness comes from keys[b]
        alone: any batch, any rank, same; temperature 0: the likeliest token, log-probs of 1.

        top_p narrows what is drawn, not what is logged: of a truncated distribution a token that
        later falls outside has no log-prob, and the ratio of two such policies no meaning."""
        x, pos, lengths, _ = self.sequence(prompts, images, task, queries=False)
        keys = range(len(prompts) * n) if keys is None else keys
        u = torch.stack([torch.rand(limit, generator=keyed(k), dtype=torch.float64)
                         for k in keys]).to(self.device)                         # (B n,limit)
        with self.autocast():
            return decode(self.vlm, self.tokenizer, x, pos, lengths, u, temperature, top_p)

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
        x, pos, _, starts = self.sequence(prompts, images, task, words, queries=False)
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

    def look(self, images, task="critique"):
        """B lists of uint8 (3,H,W) -> B lists of Looks, to be given in place of the images wherever
        those are wanted: each picture is then seen once. They stay images where the VLM is not
        shown them: there is none, or the `task` is an edit that only the DiT sees."""
        if self.vlm is None or task == "edit" and self.cfg.refs == "dit":
            return images
        new = {id(i): i for row in images for i in row if not isinstance(i, Look)}
        pictures, tokens = [*new.values()], []
        with self.autocast():
            for some in slices(len(pictures), 32):
                tokens += self.see(pictures[some])
        seen = {at: Look(image, *its) for (at, image), its in zip(new.items(), tokens)}
        return [[i if isinstance(i, Look) else seen[id(i)] for i in row] for row in images]

    def see(self, images):
        """Images, uint8 (3,H,W) -> each: the VLM's tokens (n,d), and Qwen2.5-VL's grid of them."""
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
        return Branches([(guidance, cond), *null])

    def encode_edit(self, prompts, images, keys=None, task="edit", words=None):
        """B instructions (None: no text) and B lists of uint8 (3,H,W) (empty: no image) -> Cond,
        with its references in VLM and DiT as cfg.refs says. keys: see ref_latents. task critique:
        prompts whose images are drawn anew, as `words` say."""
        ways, most = reference_ways(self.cfg, self.dit), max(map(len, images), default=0)
        if "dit" in ways and self.dit.most_refs == 1 < most:
            fail(f"SANA adds one reference to what it draws, not {most}")
        cond = self.encode(prompts, images, task, words=words)
        if "dit" in ways:
            cond.refs = self.ref_latents(images, keys)
        return cond

    def ref_latents(self, images, keys=None):
        """B lists of uint8 (3,H,W) -> B lists of clean latents (C,h,w), those of one size encoded
        together; or with UniRL-Zero's noise, .8 z + .2 eps: row b's drawn from keys[b] alone."""
        share = self.cfg.ref_noise
        rest = iter(by_size(self.to_latents, [getattr(i, "image", i) for row in images
                                              for i in row]))
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
        n, terms, images = len(prompts), Branches(), self.look(images, "edit")
        if guidance:
            terms.append((guidance, self.encode_edit(prompts, images, keys)))
        if image_guidance != guidance:
            terms.append((image_guidance - guidance, self.encode_edit([None] * n, images, keys)))
        if image_guidance != 1:
            terms.append((1 - image_guidance, self.null(n)))
        return terms

    # ---- condition -> image

    def velocity(self, x, t, branches):
        """sum_k w_k v(x, t, cond_k), branches: see Branches. fp32. Without a gradient, whose memory
        --micro bounds, rows of more than 2^27 numbers a layer, some 5 GB, go part after part."""
        t = per_sample(t, x)                             # a compiled DiT would bake a number in
        # A reference is more image: as many tokens as the longest row of them has
        refs = max((sum(r[0].numel() for r in row) for _, c in branches for row in c.refs or ()),
                   default=0)
        tokens = (x[0, 0].numel() + refs) // self.dit.patch_size**2 + branches[0][1].ctx.shape[1]
        few = max(1, 2**27 // (tokens * self.dit.width))
        if len(x) > few and not torch.is_grad_enabled():
            return torch.cat([self.velocity(x[i], t[i], Branches(branches).rows(i))
                              for i in slices(len(x), few)])
        with self.autocast():
            return sum(w * self.dit(x, t, c.ctx, c.mask, c.pooled, c.refs) for w, c in branches)

    def noise(self, keys, size=None):
        """(B,C,H,W) standard normal, row b drawn from keys[b] alone: any batch, any rank, same.
        size: pixels of a side, or of both, (H,W)."""
        size = size or self.cfg.size
        size = size if isinstance(size, tuple) else (size, size)
        h, w = (side // self.cfg.vae_factor for side in size)
        shape = (self.dit.latent_channels, h, w)
        noise = torch.stack([torch.randn(shape, generator=keyed(k)) for k in keys])
        return noise.to(self.device, non_blocking=True)      # the host does not wait for the GPU

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
        # own table for it, the uniform one x .999, rounded down to thousandths for the DiT.
        grid = cfg.grid if solver == "euler" else "uniform"
        xs, ts = [x], sigmas(steps, cfg.sample_shift, grid).tolist()
        with self.autocast():                            # weights are cast once, not at each step
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
    def draw(self, prompts, seeds, steps=10, guidance=1.0, size=None):
        """B prompts and B seeds -> uint8 (B,3,H,W). size: see noise."""
        branches = self.guided(self.encode(prompts), guidance)
        return self.to_images(self.sample(branches, steps, noise=self.noise(seeds, size)))

    # Through the VAE go 2^20 pixels at a time, 4 images of 512 x 512: all at once would need more
    # memory than the DiT's backward.

    def in_vae(self, x):
        """(B,C,H,W) as the VAE is quickest with it: on a CPU channels last, which CUDA's GroupNorm
        would undo."""
        return x.to(memory_format=torch.channels_last) if self.device.type == "cpu" else x

    @torch.no_grad()
    def to_latents(self, images):
        """uint8 (B,3,H,W) -> (B,C,H/f,W/f), about unit variance."""
        z = []
        for few in images.split(max(1, 2**20 // images[0, 0].numel())):
            x = few.to(self.device, non_blocking=True).float() / 127.5 - 1
            with self.autocast():
                z += self.vae.encode(self.in_vae(x), return_dict=False)
        # AutoencoderDC | KL. Departs from DeepGen, and UniPic2's edits, which sample the posterior.
        z = torch.cat([a if torch.is_tensor(a) else a.mode() for a in z])
        return (z.float() - self.vae_shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def to_images(self, z):
        """Latents -> uint8 (B,3,H,W)."""
        z, images = z / self.vae.config.scaling_factor + self.vae_shift, []
        most = 2**16 if self.device.type == "cpu" else 2**20     # a CPU is then twice as fast
        for few in z.split(max(1, most // (z[0, 0].numel() * self.cfg.vae_factor**2))):
            with self.autocast():
                x = self.vae.decode(self.in_vae(few)).sample
            images.append(((x.float().clamp(-1, 1) + 1) * 127.5).round().byte())
        return torch.cat(images)


@dataclass
class Trajectory:
    """What a rollout leaves of N images: their log-probs can be computed again from it."""

    x0: torch.Tensor                            # (N,C,H,W) latents of the images
    xs: torch.Tensor                            # (w+1,N,C,H,W) before, in and after the window
    logp: torch.Tensor                          # (w,N) fp32, of the window's steps
    window: range                               # its w steps: from times[k] to times[k + 1]

    def rows(self, index):
        return Trajectory(self.x0[index], self.xs[:, index], self.logp[:, index], self.window)

    @staticmethod
    def cat(parts):
        """Trajectories of one window, of one part of the images after another."""
        return Trajectory(torch.cat([p.x0 for p in parts]), torch.cat([p.xs for p in parts], 1),
                          torch.cat([p.logp for p in parts], 1), parts[0].window)


@torch.no_grad()
def rollout(model, branches, times, window, keys, eta, kind="flow", shared=False):
    """Draws N images for B conditions, G = N / B for each, in a row. -> Trajectory

    Steps of `window` add noise (sde_step); all others are Euler's. times: T+1 floats, 1 ... 0. keys
    (N): (initial noise, noise on the steps). shared: the images of one condition start from one
    noise; they are one image until the window tells them apart, and cost one forward."""
    G = len(keys) // len(branches[0][1].ctx)             # images of one condition
    same = G if shared else 1                            # images that are one until the window
    x = model.noise([initial for initial, _ in keys[::same]])                    # (N/same,C,H,W)
    branches, xs, logps = branches.repeat(G // same), [], []
    with model.autocast():                               # weights are cast once, not at each step
        for k, (t, s) in enumerate(zip(times, times[1:])):
            if k == window[0]:
                x, branches = x.repeat_interleave(same, 0), branches.repeat(same)      # (N,C,H,W)
                xs.append(x)
            v = model.velocity(x, t, branches)
            if k in window:
                noise = model.noise([fresh + k for _, fresh in keys])
                x, logp, _, _ = sde_step(v, x, t, s, eta, kind, noise=noise)
                xs.append(x)
                logps.append(logp)
            else:
                x = x - (t - s) * v
    return Trajectory(x, torch.stack(xs), torch.stack(logps), window)
