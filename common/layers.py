"""What both diffusion transformers, the bridge's connector and the scripts compute with: layers
without a policy of their own.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint


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


def blocks_of(dit):
    """-> the blocks of a DiT; one of another make may have no such list, and is one block"""
    return list(getattr(dit, "transformer_blocks", [dit]))


def compile_blocks(dit):
    """Each block of a DiT, or a DiT without blocks, runs through torch.compile. A graph is for any
    batch, size, length and number of references, and all blocks of a kind share it: after the first
    updates nothing is compiled any more. There is one for each kind, with gradient and without,
    with a mask and without, with a LoRA and without; torch by itself stops at 8. -> dit"""
    torch.compiler.config.recompile_limit = 64
    for block in blocks_of(dit):
        block.compile(dynamic=True)
    return dit


class RMSNorm(nn.RMSNorm):
    def forward(self, x):            # the weight in x's dtype, or autocast loses the fused kernel
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def attend(q, k, v, mask, first=False):
    """softmax(q k' / sqrt(d)) v, all (B,heads,N,d); mask (B,1,1,N) True = may be attended to.
    first: in each row the real tokens come first and the pads last, among queries as among keys;
    nobody reads what pads get."""
    if q.device.type == "cpu":    # written out: the fused kernel's backward is 5 times slower there
        s = (q * q.shape[-1] ** -0.5) @ k.mT                                     # (B,heads,N,N)
        s = s if mask is None else s.masked_fill(~mask, -torch.inf)
        return s.softmax(-1).to(v.dtype) @ v
    if first and mask is not None and v.dtype == torch.bfloat16:    # all that flash attention takes
        return attend_packed(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_packed(q, k, v, mask):
    """attend, where real tokens come first. The kernel takes no mask, but many sequences in a line:
    a row goes in as two, its real tokens and its pads. The cuts are computed on the GPU, so that
    the host does not wait. Each row gets one pad more, or a full row would have an empty second
    sequence. Never run on a GPU yet."""
    B, _, N, _ = q.shape
    q, k, v = (F.pad(a.to(v.dtype).transpose(1, 2), (0, 0, 0, 0, 0, 1)).flatten(0, 1)
               for a in (q, k, v))                                               # (B (N+1),heads,d)
    begin = (N + 1) * torch.arange(B, device=q.device)
    cuts = torch.stack([begin, begin + mask.sum(-1).flatten()], 1).flatten()
    cuts = F.pad(cuts, (0, 1), value=len(q)).int()                               # (2 B + 1,)
    y = varlen_attn(q, k, v, cuts, cuts, N + 1, N + 1)
    return y.unflatten(0, (B, N + 1))[:, :N].transpose(1, 2)


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
