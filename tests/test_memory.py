"""The memory plan against tensors of full size that hold no numbers (fake_gpu.py)."""

import copy
import json
import os
from functools import partial
from types import SimpleNamespace

import fits
import pytest
import ranks
import torch
from fake_gpu import CUDA, fake_gpu, place, shape_of
from transformers import AutoTokenizer

import common.memory as memory_py
import common.presets as presets_py
import common.rl as rl_py
import common.weights as weights_py
import grpo
import reflect
import rewards
import labs.nft as nft
import sft
from common.checkpoint import Ema, Trained, save_weights
from common.flow import condition, train_times
from common.memory import PROMPT, SHOWN, memory_plan, memory_report
from common.presets import Config
from common.run import adamw, clip_grads, keyed, learning, slices, sum_grads
from common.shard import local
from common.weights import adapter, computed_again, learn, swapped
from common.words import chat_ids, draw_token
from model import Unified, rollout, sigmas

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
    with_state(optimiser, optimiser.opt)
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


# Together these rows have each term of the plan; ALL_ROWS=1 takes them all, two minutes more.
SOME = ["grpo.py --preset flow-grpo --checkpoint", "grpo.py --preset deepgen",
        "pretrain.py --preset deepgen", "pretrain.py --preset openuni",
        "sft.py --preset deepgen --checkpoint", "sft.py --preset unirl-zero"]


@pytest.mark.parametrize("row", [row for row in fits.ROWS if "--shard" not in row])
def test_the_plan_is_right(row):
    """At the largest --micro of a card of 80 GB, to a tenth."""
    if row not in SOME and not os.environ.get("ALL_ROWS"):
        pytest.skip("ALL_ROWS=1 measures it")
    n, _ = fits.most(row, "80 GB") or fits.most(row, "141 GB")
    plan, peaks = measured(row, n)
    assert max(plan.values()) == pytest.approx(max(peaks.values()), rel=0.1)
    assert set(SOME) < set(fits.ROWS)


def test_reading_is_bounded():
    """What a VLM that learns takes to read all samples of a rollout without a gradient, in parts,
    to a tenth; uncut DeepGen's 256 thoughts would take 54 GiB."""
    model, args, *_ = fits.planned("reflect.py --preset deepgen --task cot --reward pickscore")
    plan = memory_py.reading(model, args, args.B * args.G)
    model = copy.deepcopy(model)
    with fake_gpu() as memory:
        put(memory, model, args, ())
        memory.peak = held = memory.held
        with torch.no_grad():
            model.encode([prompt_of(model) + " red" * args.limit] * args.B * args.G)
        assert memory.peak - held == pytest.approx(plan, rel=0.1)
        logits = torch.empty(8, 151_936, device=CUDA)
        memory.peak = held = memory.held
        logp = logits.log_softmax(1)
        draw_token(logp[torch.arange(8)], torch.empty(8, dtype=torch.float64, device=CUDA), 1)
        assert memory.peak - held == pytest.approx(memory_py.CHOICE * logits.numel(), rel=0.1)


def test_cache_of_answers():
    """A real model's keys and values take what is planned; text and vqa draw no pictures."""
    model = Unified.load(fits.ROOT / "data/shapes/sft", "shapes")
    lm, args = model.vlm.model.language_model, reflect.Args(**reflect.TASKS["text"], task="text")
    _, _, read = memory_py.lengths(model, args)
    with model.autocast():
        out = lm(inputs_embeds=torch.zeros(3, read, lm.config.hidden_size), use_cache=True)
    held = sum(a.nbytes for layer in out.past_key_values.layers for a in (layer.keys, layer.values))
    odds = memory_py.CHOICE * model.vlm.config.get_text_config().vocab_size
    assert memory_py.speaking(model, args, 3) == held + 3 * odds
    phases = memory_plan(model, args, 0, 8, [], torch.device("cpu"))[1]
    assert phases["rollout"] == memory_py.speaking(model, args, args.B * args.G)


def test_docs_have_the_table():
    page = (fits.ROOT / "docs/weights.md").read_text()
    assert fits.written(page) == page, "python tests/fits.py writes it"
    assert page.count("with `--micro N`") == 1


def test_a_fake_gpu_counts():
    """What is held, what is freed, what autograd keeps, what autocast casts and keeps."""
    with fake_gpu() as memory:
        x, w = (torch.empty(256, 256, device=CUDA) for _ in "xw")
        w.requires_grad_()
        assert memory.held == memory.peak == 2 * 2**18 and x.device == CUDA
        y = x @ w
        del y
        assert memory.held == 2 * 2**18 and memory.peak == 3 * 2**18
        with torch.autocast("cuda", torch.bfloat16):
            y = torch.nn.functional.linear(x, w)
            assert y.dtype == torch.bfloat16
            assert memory.held == 2 * 2**18 + 3 * 2**17         # y, and both in bf16
            assert torch.nn.functional.layer_norm(y, (256,)).dtype == torch.float32
            z = y.view(128, 512)[:1]                            # of y's memory
        assert memory.held == 2 * 2**18 + 2 * 2**17             # x wants no gradient, and so no w
        z.float().square().sum().backward()
        assert w.grad.shape == w.shape and w.grad.dtype == torch.float32
        del y, z
        assert memory.held == 3 * 2**18 and memory.peak > 4 * 2**18
    with pytest.raises(RuntimeError):
        torch.empty(1, device=CUDA)
    with torch.autocast("cpu", torch.bfloat16):                 # as before
        assert torch.nn.functional.softmax(torch.ones(2), 0).tolist() == [0.5, 0.5]


@pytest.fixture
def cfg(parts):
    return Config(**json.loads((parts / "config.json").read_text()))


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_held(cfg, parts, monkeypatch, rank):
    """From shapes alone the same bytes as of the model that was built and trained."""
    what = dict(bridge=None, dit=adapter("dit", rank, 4), vlm=adapter("vlm", 3, 6))
    monkeypatch.setitem(presets_py.PRESETS, "shapes", cfg)
    args = SimpleNamespace(lora_rank=rank, batch=8, ema=0.9)
    cpu = torch.device("cpu")
    with monkeypatch.context() as m:
        m.setattr(weights_py, "read_safetensors",
                  lambda f, names_only=False: 1 / 0)                        # no weight is read
        plan = learn(Unified.from_preset("shapes", meta=True), what)
        assert all(p.device.type == "meta" for p in plan.parameters())
        held, phases = memory_plan(plan, args, 8, 8, ["dit"], cpu)
        said = memory_report(plan, args, 8, 8, ["dit"], cpu)
    real = learn(Unified.from_preset("shapes"), what)
    stored = {t.data_ptr(): t for t in [*real.parameters(), *real.buffers()]}
    assert held["weights"] == sum(t.nbytes for t in stored.values())
    real.velocity(real.noise([1]), 0.5, [(1.0, real.encode(["x"]))]).sum().backward()
    params = learning(real)
    opt = torch.optim.AdamW(params.values())
    opt.step()
    assert held["AdamW"] == sum(s[k].nbytes for s in opt.state.values()
                                for k in ("exp_avg", "exp_avg_sq"))
    assert held["average"] == sum(t.nbytes for t in Ema(params, 0.9).mean.values())
    before = rl_py.initial_policy(real, ["dit"], cpu)[0]
    assert held["reference"] == sum(t.nbytes for t in [*before.parameters(), *before.buffers()])
    assert sum(p.grad.nbytes for p in params.values()) < phases["update"]
    args.ema = 0
    assert memory_plan(plan, args, 8, 8, ["dit"], cpu)[0]["average"] == 0   # no copy, see Ema
    assert "does not fit" not in said
    monkeypatch.setattr(memory_py.os, "sysconf", lambda name: 1000)
    said = memory_report(plan, args, 4096, 8, ["dit"], cpu)
    assert "a lower --batch" in said and ("--lora-rank 32" in said) == (rank == 0)


def hold(photos, out):
    """sft.py's own main as a rank; what was planned and what it holds then go into held.json."""
    found = []

    def remember(real):
        return lambda *given: found.append(real(*given)) or found[-1]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(weights_py, "memory_report", lambda *given: found.append(memory_plan(*given)[0]))
        m.setattr(sft, "Trained", remember(sft.Trained))
        ranks.play(photos, out, "sft", "--shard", "--ema", 0.9)
    if len(found) == 2:                   # rank 0 alone plans
        plan, trained = found
        held = dict(weights=[*trained.model.parameters(), *trained.model.buffers()],
                    average=trained.ema.mean.values(),
                    AdamW=[s[k] for s in trained.opt.state.values()
                           for k in ("exp_avg", "exp_avg_sq")])
        held = {name: sum({id(t): local(t).nbytes for t in some}.values())
                for name, some in held.items()}
        (out / "held.json").write_text(json.dumps([plan, held]))


def test_what_ranks_hold(parts, tmp_path):
    """With --shard, of real ranks, here two on a CPU."""
    ranks.rows(tmp_path / "out", lambda: hold(ranks.photos_of(parts), tmp_path / "out"))
    said, found = json.loads((tmp_path / "out/held.json").read_text())
    for name, size in found.items():
        assert size == pytest.approx(said[name], rel=0.02) and size > 0
    assert found["AdamW"] == 2 * found["average"] < found["weights"]


def test_the_plan_of_a_lab():
    """It counts the pictures of a rollout, as of every RL script, and the policy that follows."""
    model = Unified.load(fits.ROOT / "data/shapes/sft", "shapes")
    learn(model, dict(dit=None))
    plans = []
    for Args in (grpo.Args, nft.Args):
        held, phases = memory_plan(model, Args(B=8, G=4), 8, 0, [], torch.device("cpu"))
        assert phases.keys() == {"look", "rollout", "update"}
        plans.append(held["average"] / memory_py.learned(model))
    assert plans == [4, 8]


def test_models_of_rewards():
    """Each reward that loads a model is known; a judge at an endpoint takes nothing here."""
    with_models = {name for name, where in rewards.REWARDS.items() if where in (
        "rewards.clip", "rewards.judge", "rewards.geneval", "rewards.ocr")
        or name == "ocr"} | {"cycle"}                    # a short name of cycle_edit.py
    assert memory_py.REWARDS.keys() == with_models
    photos = SimpleNamespace(cfg=SimpleNamespace(preset="deepgen"))

    def held(reward, url="", **more):
        return memory_py.rewards_of(photos, SimpleNamespace(reward=reward, judge_url=url, **more))
    assert held("clip:0.5,aesthetic") == held("clip") == 1.7e9           # one CLIP, loaded once
    assert held("preference:0.3,judge,ocr") == held("judge") + held("ocr")
    assert held("judge", "http://x") == held("jpeg_compressibility") == 0
    assert held("judge", task="text") == 0
