"""The memory plan against tensors of full size that hold no numbers (fake_gpu.py)."""

import copy
from functools import partial

import fits
import grpo
import pytest
import torch
from fake_gpu import CUDA, fake_gpu, place, shape_of
from transformers import AutoTokenizer

import common.rl as rl_py
from common.checkpoint import Trained, save_weights
from common.flow import condition, train_times
from common.memory import PROMPT, SHOWN, memory_plan
from common.run import adamw, clip_grads, keyed, learning, slices, sum_grads
from common.weights import computed_again, swapped
from common.words import chat_ids
from model import rollout, sigmas

TOKENIZER = AutoTokenizer.from_pretrained(fits.ROOT / "data/shapes/vlm", model_max_length=77)


def once(memory, module):
    """Without a gradient a module adds the same to what is held each time: it is computed once for
    each shape of its input, later calls are only counted."""
    known, real = {}, module.forward

    def forward(x, *rest, **named):
        if torch.is_grad_enabled():
            return real(x, *rest, **named)
        key = x.shape, *map(shape_of, rest), bool(memory.autocast.cache)
        held, peak = memory.held, memory.peak
        if key not in known:
            memory.peak = held
            out = real(x, *rest, **named)
            known[key] = memory.peak - held, out.shape, out.dtype
            memory.peak = max(peak, memory.peak)
            return out
        more, shape, dtype = known[key]
        memory.peak = max(peak, held + more)
        return torch.empty(shape, dtype=dtype, device=CUDA)
    module.forward = forward


def put(memory, model, args, copies):
    """A planned model on the fake GPU, with a tokenizer. -> the initial policy, see set_up"""
    initial = rl_py.initial_policy(model, copies, CUDA)
    place(memory, model)
    for name, part in zip(("dit", "bridge", "vlm"), initial):
        if name in copies:
            place(memory, part)
    model.tokenizer = TOKENIZER
    if model.text_encoder is not None:
        model.text_encoder.tokenizers = [TOKENIZER] * 3
    if args.checkpoint:
        model.dit.checkpoint = True
        computed_again(model.vlm.model.language_model.layers if model.vlm else ())
    for part in (model.dit, model.vae.encoder, model.vae.decoder):
        once(memory, part)
    shape = [model.cfg.size // model.cfg.vae_factor] * 2
    model.noise = lambda keys, size=None: torch.empty(
        (len(keys), model.dit.latent_channels, *shape), device=CUDA)
    return initial


def prompt_of(model):
    """A prompt that with its chat has PROMPT tokens"""
    text = ""
    while model.vlm and len(chat_ids(model.cfg, TOKENIZER, text, "t2i", [])) < PROMPT:
        text += " red"
    return text


def with_gradients(params):
    """As after a first micro-batch"""
    for p in params.values():
        p.grad = torch.zeros_like(p)


def with_state(trained, opt):
    """As after a first step: AdamW has its state"""
    with_gradients(trained.params)
    opt.step()
    opt.zero_grad(set_to_none=True)


class Peaks(dict):
    def __init__(self, memory):
        self.memory = memory
        memory.peak = memory.held

    def lap(self, phase):
        self[phase] = self.memory.peak
        self.memory.peak = self.memory.held


def reinforced(memory, model, args, rows, initial, ranks):
    """An iteration of grpo.py's loop, of whose micro-batches the last is computed. -> Peaks"""
    learns, B, G = grpo.TRAIN[args.train], args.B // ranks, args.G
    optimiser = rl_py.Optimiser(args, model)
    with_state(optimiser, optimiser.adamw)
    peaks, asked = Peaks(memory), [prompt_of(model)] * B
    times = sigmas(args.T, model.cfg.sample_shift, args.grid or model.cfg.grid).tolist()
    branches = grpo.encode(model, asked, args, learns)
    leaf = branches.leaf()
    anchor = None
    if args.beta:
        own = leaf
        if "bridge" in learns:
            with swapped(model, initial):
                own = grpo.encode(model, asked, args, ())
        anchor = rl_py.Anchor(initial, own, args.beta, args.kl)
    path = rollout(model, leaf, times, range(args.window), [(0, 0)] * B * G, args.eta, args.kind,
                   args.shared_noise)
    model.to_images(path.x0)
    peaks.lap("rollout")
    taken = path.rows(torch.arange(B * G, device=CUDA))
    few = torch.arange(min(B * G, rows), device=CUDA)
    with_gradients(optimiser.params)
    grpo.surrogate(model, leaf, few // G, taken.rows(few), torch.ones(len(few), device=CUDA), times,
                   1, args, anchor, [0])
    branches.pull(leaf)
    peaks.lap("update")
    del taken
    optimiser.update(0, [], asked)
    peaks.lap("step")
    del branches, leaf, anchor, path
    with optimiser.averaged():
        model.draw([asked[0]] * SHOWN, range(SHOWN), 2, args.guidance)
    peaks.lap("look")
    return peaks


def taught(memory, model, args, rows, ranks):
    """A step of pretrain.py's and sft.py's loop, of whose micro-batches the last is computed.
    -> Peaks"""
    opt = adamw(model, args)
    trained = Trained(args, model, opt, partial(save_weights, model))
    with_state(trained, opt)
    peaks, n = Peaks(memory), args.batch // ranks
    images = torch.zeros(n, 3, model.cfg.size, model.cfg.size, dtype=torch.uint8)
    x0 = model.to_latents(images)
    eps, t = model.noise(range(n)), train_times(n, model.cfg, keyed(0)).to(CUDA)
    x_t = torch.lerp(x0, eps, t.view(-1, 1, 1, 1))
    parts = slices(n, args.micro)
    if len(parts) > 1:
        with_gradients(trained.params)
    i = parts[-1]
    model.train()
    cond = condition(model, [prompt_of(model)] * len(x_t[i]))
    v = model.velocity(x_t[i], t[i], [(1.0, cond)])
    (v - (eps - x0)[i]).square().mean((1, 2, 3)).sum().backward()
    del cond, v, x0, eps, x_t
    peaks.lap("update")
    sum_grads(list(trained.params.values()))
    clip_grads(trained.params.values())
    opt.step()
    opt.zero_grad(set_to_none=True)
    peaks.lap("step")
    model.eval()
    with trained.averaged():
        model.draw([prompt_of(model)] * SHOWN, range(SHOWN), 2, 3.0)
    peaks.lap("look")
    return peaks


def measured(row, n):
    """-> the plan's bytes by phase, but for rewards, and those of the fake GPU"""
    ranks, given = fits.ROWS[row][1], fits.at(row, n)
    rewards, (model, args, rows, _, copies, _) = memory_plan(*given)[0]["rewards"], given
    model = copy.deepcopy(model)
    with fake_gpu() as memory:
        initial = put(memory, model, args, copies)
        peaks = (reinforced(memory, model, args, rows, initial, ranks) if hasattr(args, "window")
                 else taught(memory, model, args, rows, ranks))
    return {name: size - rewards for name, size in fits.plan_of(row, n).items()}, peaks


@pytest.mark.parametrize("row", [row for row in fits.ROWS if "--shard" not in row])
def test_the_plan_is_right(row):
    """At the largest --micro of a card of 80 GB"""
    n, _ = fits.most(row, "80 GB") or fits.most(row, "141 GB")
    plan, peaks = measured(row, n)
    assert max(plan.values()) == pytest.approx(max(peaks.values()), rel=0.1)
