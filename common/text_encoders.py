"""Text encoders of a DiT itself (bridge `text`): SD3's CLIPs and T5, and open_clip's."""

import re

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

from common.run import beside
from common.weights import attempt, pretrained
from common.words import token_rows


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
            attempt(f"{folder}/tokenizer{i} cannot be read", lambda: AutoTokenizer.from_pretrained(
                folder, subfolder=f"tokenizer{i}")) for i in ("", "_2", "_3")[: 3 if t5 else 2]]
        self.t5_tokens, self.ctx_dim = t5_tokens, ctx_dim

    @torch.no_grad()
    def forward(self, prompts):
        def ids(tokenizer, length):
            rows = token_rows(tokenizer, prompts, padding="max_length", max_length=length,
                              truncation=True)
            return torch.tensor(rows).to(self.clips[0].device, non_blocking=True)
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
        return torch.cat([ctx, t5], 1).float(), None, pooled.float()


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


def load_text_encoder(cfg, dit, meta=False):
    """-> the preset's own text encoder, and its tokenizer, where that stands apart"""
    if cfg.text == "clip":
        name = f"local-dir:{beside(cfg.text_encoder)}"
        claim = f"{cfg.text_encoder} cannot be read as open_clip's"
        clip = attempt(claim, lambda: open_clip.create_model(name))
        return clip, attempt(claim, lambda: clip_words(name))
    return SD3Text(cfg.text_encoder, cfg.text == "sd3", cfg.t5_tokens, dit.context_dim, meta), None


@torch.no_grad()
def clip_states(clip, tokenizer, prompts, device):
    """Of open_clip's model, as SD3: the last-but-one states as context, its sentence as pooled."""
    ids = tokenizer(prompts)                                                     # (B,context)
    n = (ids != clip.text_eos_id).sum(1) + 1                                     # one end-of-text
    mask = torch.arange(int(n.max())) < n[:, None]                               # (B,L)
    L, n, mask, ids = mask.shape[1], *(a.to(device, non_blocking=True) for a in (n, mask, ids))
    x = clip.token_embedding(ids[:, :L]) + clip.positional_embedding[:L]
    for block in clip.transformer.resblocks:
        last_but_one, x = x, block(x, attn_mask=clip.attn_mask[:L, :L])          # causal
    end = clip.ln_final(x[torch.arange(len(x), device=device), n - 1])
    pooled = end @ clip.text_projection
    return clip.ln_final(last_but_one).float(), mask, pooled.float()
