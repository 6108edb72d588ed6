"""Flow matching: what stages 1 and 2 (and DeepGen's loss beside RL) learn from a batch.

x_t = (1-t) x_0 + t eps, v = eps - x_0; n pairs, C h w latent here, H W the picture's
"""

import torch

from common.run import all_mean, keyed
from common.words import spell


def train_times(n, cfg, rng):
    """(n,) times at which the preset learns the flow, shifted once as in sampling."""
    if cfg.t_dist == "uniform":
        t = torch.rand(n, generator=rng)
    else:
        t = torch.sigmoid(torch.randn(n, generator=rng) + cfg.t_mean)
    return cfg.train_shift * t / (1 + (cfg.train_shift - 1) * t)


def condition(model, prompts, refs=None, words=None, keys=None):
    """What a training batch tells the DiT; its task shows in what there is: pictures (prompts
    alone), edits (and refs), thoughts (and words), reflections (both). A prompt that is
    withheld, None, takes its words along. -> Cond"""
    task, words = taught(model, prompts, refs, words)
    if refs is None:
        return model.encode(prompts, task=task, words=words)
    return model.encode_edit(prompts, refs, keys, task, words)


def taught(model, prompts, refs, words):
    """-> task of a training batch, its texts as Words, None without."""
    if words is None:
        return "t2i" if refs is None else "edit", None
    said = [None if p is None else w for p, w in zip(prompts, words)]
    return "think" if refs is None else "critique", spell(model, said)


def lm_loss(model, prompts, refs, words):
    """The autoregressive loss of a batch's words, summed over their tokens."""
    task, words = taught(model, prompts, refs, words)
    return -model.text_logp(prompts, refs, words, task).sum()


def count_tokens(model, prompts, words, world):
    """-> how many tokens the words of all ranks' batches have, at least 1. Every rank calls it."""
    mine = taught(model, prompts, None, words)[1].mask.sum().item()
    return max(1, world * all_mean([mine])[0])


def noised(model, x0, keys):
    """Latents x0 (n,C,h,w), each at a random time and with noise that are drawn from its key alone
    -> x_t (n,C,h,w), t (n,), v* = eps - x0 (n,C,h,w)"""
    t, eps = torch.empty(len(keys)), torch.empty(x0.shape)
    for i, k in enumerate(keys):
        t[i : i + 1] = train_times(1, model.cfg, keyed(k))
        eps[i] = torch.randn(x0.shape[1:], generator=keyed(k + 1))
    t, eps = (a.to(x0.device, non_blocking=True) for a in (t, eps))
    return torch.lerp(x0, eps, t.view(-1, 1, 1, 1)), t, eps - x0


def flow_loss(model, images, prompts, keys):
    """The flow matching loss of n pairs, as in sft.py, but that no caption is withheld. images
    uint8 (n,3,H,W); time and noise of a pair are drawn from its key alone. -> (n,)"""
    x_t, t, target = noised(model, model.to_latents(images), keys)            # (n,C,h,w)
    v = model.velocity(x_t, t, [(1.0, model.encode(prompts))])
    return (v - target).square().mean((1, 2, 3))
