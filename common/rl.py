"""What the three RL scripts share. Of a first reading only Anchor, the KL to the initial policy,
and fine_tune are part; the rest is checks of flags, the optimiser, noise keys, statistics of
ratios, time, and LDAM, an option of one paper.
"""

import copy
import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch

from common.checkpoint import Trained, save_weights
from common.flags import HUB, inside, must_exist, number, read_flag, shown, there
from common.flow import flow_loss
from common.layers import compile_blocks
from common.presets import preset
from common.record import check_out, read_log
from common.run import (OF_LDAM, OF_PAIRS, PER_SAMPLE, Finite, all_gather, all_mean, clip_grads,
                        fail, key, keyed, learning, odds, on_gpu, slices, span, sum_grads, table)
from common.shard import add_up, by_kind, gather, share_out
from common.stop import this_rank
from common.weights import adapter, in_bf16, load_model, swapped


def check_flags(args, world, what):
    """Where flags do not go together: the errors that a user of any RL script can make, before
    anything is loaded or written. what: the script draws B of it, such as "prompts"."""
    if args.B % world:
        fail(f"--B {args.B} {what} cannot be shared by {world} ranks: choose a multiple")
    check_out(args)
    if args.final_bench and not args.preset.startswith("shapes"):
        fail("--final-bench is of the classroom; for photos, when the run is over: eval.py --bench "
             "geneval --init OUT --out FOLDER")
    if args.lora_rank and args.train == "bridge":
        fail("--lora-rank adapts the DiT: --train dit or both")
    if not args.judge_url and not there(args.judge, HUB):        # of an address see Judge
        fail(f"--judge {shown(args.judge)}: must be {HUB}; of an endpoint give --judge-url, too")
    if hasattr(args, "window"):
        check_window(args, world)


def check_window(args, world):
    """The same, of scripts that step at random on a window of steps."""
    if not args.window_start <= args.window_stop < args.T - args.window:
        fail(f"a window of {args.window} steps starting at {args.window_start} to "
             f"{args.window_stop} must end before the last of --T {args.T} steps, which adds no "
             "noise")
    # So many noises has a sample, see key; the last is of reflect.py's words.
    if args.window_stop + args.window >= PER_SAMPLE - 1:
        fail(f"a window of {args.window} steps starting at {args.window_stop} ends behind step "
             f"{PER_SAMPLE - 2}, up to which steps may be random")
    if args.eta > 1 and args.kind.startswith("cps"):
        fail(f"--eta {args.eta:g}: --kind {args.kind} replaces all of the noise at 1, and no more")
    if args.beta and not args.eta and args.kl != "velocity":
        fail("--beta: without noise on the steps, --eta 0, this KL is infinite; --kl velocity is "
             "not")
    if args.B * args.G % args.updates:
        fail(f"--B {args.B} x --G {args.G} samples cannot be shared by --updates {args.updates}")
    if getattr(args, "trained", 0) > args.window:
        fail(f"--trained {args.trained} of a window of {args.window} steps")
    if getattr(args, "sft", 0):
        must_exist(args, "sft_data")
        if args.sft_batch % world:
            fail(f"--sft-batch {args.sft_batch} images cannot be shared by {world} ranks")


def read_mix(text):
    """--mix -> weights of categories, {} where all rows are alike; ValueError"""
    mix = table(text, number)
    if wrong := [name for name, weight in mix.items() if not inside(weight, "[0, 1e6]")]:
        raise ValueError(f"the weight of {wrong[0]!r} must be a number in [0, 1e6]")
    return mix


def must_be_drawn(args, mix, rows, where):
    """The user's error where --mix leaves no row of --data or --prompts."""
    if mix and not odds(rows, mix).any():
        fail(f"--mix {shown(args.mix)} gives no row of {where} a weight above 0")


def adapters(args, parts):
    """Parts that learn -> {part: its LoRA by --lora-rank or --vlm-lora-rank, or None: all of it}"""
    ranks = dict(dit=(args.lora_rank, args.lora_alpha),
                 vlm=(getattr(args, "vlm_lora_rank", 0), getattr(args, "vlm_lora_alpha", 128)))
    return {part: adapter(part, *ranks[part]) if part in ranks else None for part in parts}


def initial_policy(model, copies, device):
    """(DiT, bridge, VLM) as they are now, of those named in `copies` frozen copies: for `swapped`.
    Like all that is frozen, copies are held in bf16 on a GPU."""
    hold = in_bf16 if model.bf16 and device.type == "cuda" else lambda part: part
    return [hold(copy.deepcopy(part).requires_grad_(False)) if name in copies else part for
            name, part in (("dit", model.dit), ("bridge", model.bridge), ("vlm", model.vlm))]


def set_up(Unified, args, parts, rows, reads, anchored, rank, device):
    """The model, of which `parts` learn, and what trains it. rows: images per DiT backward; reads:
    prompts that the VLM reads with gradient; anchored: does a KL want the initial policy? Of a part
    whose LoRA learns that is the part with the LoRA switched off; of others that learn, a copy.
    -> model, initial policy or None, Optimiser"""
    learns = adapters(args, parts)
    copies = [part for part, lora in learns.items() if anchored and not lora]
    model = load_model(Unified, args, learns, rows, reads, rank, device, copies)
    initial = initial_policy(model, copies, device) if anchored else None      # whole on each rank
    if args.compile and "dit" in copies:                 # what compiles a DiT is not copied
        compile_blocks(initial[0])
    model = share_out(model, device) if getattr(args, "shard", False) else model     # labs: no flag
    if rank == 0 and hasattr(args, "clip") and args.kind != "cps-simple":  # its logp has no nats
        print(f"--clip {args.clip:g} is {args.clip * latent_numbers(model):.3g} nats: a log-prob "
              f"is a mean over {latent_numbers(model)} latent numbers")
    return model, initial, Optimiser(args, model)


def latent_numbers(model):
    """-> D, how many numbers the latents of one image are"""
    return math.prod(model.noise([0]).shape)


class Optimiser(Trained):
    """AdamW over what learns. The DiT with its bridge, and the language model, have each a rate of
    their own and are clipped by a norm of their own. Rates rise over 5 iterations and, from the
    first on, fall linearly to a tenth.
    Departs from Flow-GRPO, whatever the recipe: betas .9 and .999 there, and a constant rate."""

    def __init__(self, args, model):
        params = learning(model)
        self.steps, self.finite = args.steps, Finite()
        by_rate = dict(lr=[], lm_lr=[])                  # flag -> the parameters that it moves
        for name, p in params.items():
            by_rate["lm_lr" if name.startswith("vlm.") else "lr"].append(p)
        self.by_rate = {rate: some for rate, some in by_rate.items() if some}
        groups = [(getattr(args, rate), kind)
                  for rate, some in self.by_rate.items() for kind in by_kind(some)]
        self.peaks = [peak for peak, _ in groups]
        adamw = torch.optim.AdamW([dict(params=kind) for _, kind in groups], lr=self.peaks[0],
                                  betas=(0.9, 0.99), weight_decay=args.wd, fused=on_gpu(params))
        super().__init__(args, model, adamw, partial(save_weights, model))

    def ready(self):
        """Of --shard each rank has all weights, until the next gradients are added up."""
        super().ready()
        gather(self.model)

    def update(self, step, watched, prompts):
        """One step by the gradients summed over ranks, unless they, or the ratios `watched`, are
        not finite. prompts: this rank's, for the message then. -> {"grad_norm": ...}"""
        add_up(self.model)
        sum_grads(list(self.params.values()), watched)
        norms = {rate.replace("lr", "grad_norm"): clip_grads(some)
                 for rate, some in self.by_rate.items()}
        for group, peak in zip(self.opt.param_groups, self.peaks):
            group["lr"] = peak * min(1, (step + 1) / 5) * (1 - 0.9 * step / self.steps)
        if self.finite(step, [*norms.values()], prompts):
            self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.ready()
        return norms


def draw_rows(rows, n, rng, mix=None):
    """n rows in random order, each at most once (again from the first where there are fewer).
    mix: {category: weight}, see odds."""
    rates = odds(rows, mix) if mix else None
    if mix:
        chosen = rates.multinomial(min(n, int((rates > 0).sum())), generator=rng).tolist()
    else:
        chosen = torch.randperm(len(rows), generator=rng)[:n].tolist()
    return [rows[chosen[i % len(chosen)]] for i in range(n)]


def draw_steps(args, rng):
    """Which of the window's steps, from 0, an iteration trains: --trained of them, or all."""
    order = torch.randperm(args.window, generator=rng).tolist()
    return sorted(order[: args.trained or None])


def draw_window(args, rng):
    """Consecutive steps that are random: their first is drawn anew for each iteration."""
    first = int(torch.randint(args.window_start, args.window_stop + 1, (), generator=rng))
    return range(first, first + args.window)


def noise_keys(args, step, samples, group, stride=PER_SAMPLE, leg=0):
    """Of each sample, by its number among all ranks', the key of its initial noise, which a group
    shares with --shared-noise, and the key of the noise on its steps: ranks change neither."""
    return [(key(args.seed, step, (n // group * group if args.shared_noise else n) * stride + leg),
             key(args.seed, step, n * stride + leg + 1)) for n in samples]


def deal_out(scores, rng):
    """The control --shuffle: what the images of all ranks got, with the rewards that they were
    asked for, is dealt out at random over them. rng: every rank's alike"""
    every = all_gather((scores.values, scores.weights))
    values, weights = (torch.cat(of_ranks) for of_ranks in zip(*every))          # of all ranks
    order = torch.randperm(len(values), generator=rng)
    mine = order[this_rank() * len(scores.values) :][: len(scores.values)]
    scores.values, scores.weights = values[mine], weights[mine]


def disagreeing(advantage, G):
    """-> indices of the samples whose group of G has more than one score; the rest teach nothing"""
    spread = advantage.view(-1, G).abs().amax(1) > 0
    return spread.repeat_interleave(G).nonzero()[:, 0]


def batch_std(r):
    """Rewards, NaN = not scored -> their std over all ranks, one of which may have none at all."""
    squares, total, n = all_mean([r.square().nansum(), r.nansum(), (~r.isnan()).sum()])
    return max(0, squares / n - (total / n) ** 2) ** 0.5 if n else 0.0


@dataclass
class Anchor:
    """The initial policy, which a KL of weight beta keeps the learning one near."""

    policy: list                                # (DiT, bridge, VLM), see swapped
    branches: list                              # its own conditions of the same prompts
    beta: float
    form: str                                   # mean, flow-grpo or velocity: --kl

    def kl(self, model, kernel, owner, x, t, s, v, mean, std):
        """Of rows of surrogate, where v, mean and std are the learning policy's -> KL (rows,)"""
        with torch.no_grad(), swapped(model, self.policy):
            v_ref = model.velocity(x, t, self.branches.rows(owner))
            mean_ref = kernel(v_ref, x, t, s, x_next=x)[2]       # any x_next: so no noise is drawn
        if self.form == "velocity":       # DeepGen eq. 4; its code divides by 2 std^2
            return (v - v_ref).square().mean((1, 2, 3))
        # In closed form between Gaussians of one std, mean over D
        kl = ((mean - mean_ref).square() / (2 * std**2)).mean((1, 2, 3))
        return kl * (t - s) if self.form == "flow-grpo" else kl   # in its code std lacks the step


def ratio_stats(seen, clip, nats, beta, prefix=""):
    """seen: for each update of the iteration a list of (rows,2), ratio and KL -> columns of the
    log. ratio_off is the largest |ratio - 1| of the first update, whose policy is still the one
    that drew: rounding alone. kl: only with a beta; the others: only with several updates, since
    in the first the ratio is 1. clipped: the share of ratios outside 1 +- clip, of which the clip
    stops those that their advantage pushes further out; nats: how many nats of the sample a unit
    of log-ratio is. Of this rank's rows: the log has the mean of the ranks."""
    none = torch.tensor([[1.0, 0.0]], device=next((x.device for u in seen for x in u), "cpu"))
    ratio, kl = torch.cat([x for u in seen for x in u] or [none]).T
    stats = dict(ratio_off=(torch.cat([none, *seen[0]])[:, 0] - 1).abs().max())
    if beta:
        stats |= dict(kl=kl.mean())
    if len(seen) > 1:
        stats |= dict(
            ratio_low=ratio.quantile(0.05), ratio_high=ratio.quantile(0.95),
            clipped=((ratio - 1).abs() > clip).float().mean(),
            # E[L^2] / 2 of log-ratios L is about the KL from the old policy: in nats
            kl_old=(nats * ratio.log()).square().mean() / 2)
    return {prefix + name: value for name, value in stats.items()}


def fine_tune(model, data, args, step, update, rank, world):
    """DeepGen eq. 5: (1 - sft) RL + sft SFT. Adds the gradient of the second. -> its share of the
    log's column: the mean over the iteration's updates"""
    images, prompts = next(data)
    keys = [key(args.seed, step, OF_PAIRS + 2 * (update * args.sft_batch + i * world + rank))
            for i in range(len(prompts))]            # by the number among all ranks' pairs
    total = 0.0
    for i in slices(len(keys), args.micro):
        loss = flow_loss(model, images[i], prompts[i], keys[i]).sum() / args.sft_batch
        (args.sft * loss).backward()
        total += loss.detach().double() * world      # the host waits for no micro-batch
    return total / args.updates


class Clock:
    """Seconds that the parts of an iteration take."""

    def __init__(self):
        self.last, self.spent = time.time(), Counter()

    def lap(self, part):
        now = time.time()
        self.spent[f"s_{part}"] += now - self.last
        self.last = now

    def row(self):
        return {part: round(seconds, 3) for part, seconds in self.spent.items()}


class Ldam:
    """ParaUni's algorithm 1: once the gradient norm has leapt and a reward has fallen again and
    again, the next iteration sees that reward's layers through noise, c_i (1 + gamma eps) (eq. 6);
    then comes a rest, the longer the later.

    What the paper leaves open: gamma(g, r), which is in its supplement, is a constant here; eps is
    one number per layer; it lasts for one iteration, as c_i does; of several rewards, each has its
    own falls; the null of guidance is left alone."""

    def __init__(self, args, at, layers):
        self.args, self.at, self.layers = args, at, layers       # at {reward: its range of layers}
        self.g, self.r, self.leapt = math.inf, dict.fromkeys(at, 0.0), False
        self.falls, self.rest = dict.fromkeys(at, 0), 0

    def after(self, row):
        """row: what is logged of an update, all that a restart needs. -> layer_noise (layers,) of
        the next, or None"""
        a, n, g, due = self.args, row["step"], row["grad_norm"], []
        r = {k: row[f"reward_{k}"] for k in self.at if f"reward_{k}" in row}
        self.leapt |= g >= self.g * a.ldam_leap
        self.falls |= {k: self.falls[k] + (r[k] <= self.r[k]) for k in r}
        if self.rest:
            self.rest -= 1
        elif self.leapt:
            due = [k for k in self.at if self.falls[k] >= a.ldam_falls]
        self.g, self.r = g, self.r | r
        if not due:
            return None
        self.leapt, self.rest, self.falls = False, n, self.falls | dict.fromkeys(due, 0)
        rng = keyed(key(a.seed, n, OF_LDAM))
        chosen = torch.tensor([any(i in self.at[k] for k in due) for i in self.layers])
        return 1 + a.ldam_gamma * chosen * torch.randn(len(self.layers), generator=rng)

    def resumed(self, out, start):
        """As after the rows of a run's log up to update `start`. -> layer_noise of the next"""
        rows = [row for row in read_log(out) if 0 < row["step"] <= start] if start else []
        if len(rows) != start:
            fail(f"{out}/log.jsonl lacks rows up to update {start}, which --ldam goes by")
        noise = None
        for row in rows:
            noise = self.after(row)
        return noise


def ldam_layers(args, weights):
    """--ldam, where a script has it -> {reward: its range of layers}, of the rewards that the run
    has."""
    if not getattr(args, "ldam", ""):
        return {}
    cfg, given = preset(args.preset), read_flag(args, "ldam", partial(table, value=span))
    found = {name: at for name, at in given.items() if any(name in w for w in weights.values())}
    if cfg.bridge != "lim" or not any(i in at for at in found.values() for i in cfg.layers):
        fail(f"--ldam {shown(args.ldam)} wants a preset with bridge lim, of its layers "
             f"{min(cfg.layers, default=0)}-{max(cfg.layers, default=0)}, and a reward in --reward")
    return found


def wants_final_bench(args):
    """Is there a benchmark before and after, at the end? By default not after a mere trial."""
    wanted = args.steps >= args.eval_every if args.final_bench is None else args.final_bench
    return wanted and args.preset.startswith("shapes")
