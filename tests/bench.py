"""A benchmark, not a test: what an optimised image and a held-out gain cost, here and with peers.

    python tests/bench.py                      # --minutes bounds our run; theirs may take 4 x ours
    python tests/bench.py --recipes --minutes 5    # the same, recipe by recipe
    python tests/bench.py --loader             # pictures a second: folder, shards, plain Pillow
    python tests/bench.py --linear             # how cost grows with group, resolution, ranks

Ours is grpo.py itself, called with its default recipe. Theirs is a plain Flow-GRPO loop (Liu et al.
2025, as its public code does it) on the same checkpoint, prompts, reward, batch and learning rate:
guidance 4.5 in rollout and update, all steps but the last trained, one forward per timestep, own
initial noise, a prompt encoded once per image, two optimiser steps per rollout. Seconds are those
of training: evaluations are left out. A gain counts when two evaluations in a row show it.
"""

import argparse
import json
import os
import signal
import socket
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from apart import Apart, Enough, metered
from bridges import told
from PIL import Image, ImageOps
from torch.nn.modules.module import register_module_forward_pre_hook

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as eval_py  # noqa: E402
import grpo  # noqa: E402
from common.checkpoint import Ema  # noqa: E402
from common.data import pairs  # noqa: E402
from common.presets import PRESETS, RECIPES  # noqa: E402
from common.record import Recorder  # noqa: E402
from common.run import key, keyed, setup  # noqa: E402
from common.sana import SanaDiT  # noqa: E402
from data.shapes.bench import bench_shapes  # noqa: E402
from eval import read_weights, score  # noqa: E402
from rewards.prompts import read_prompts  # noqa: E402
from model import MMDiT, Unified, sde_step, sigmas  # noqa: E402

PARTS = ("rollout", "decode", "reward", "update")
GAINS = (0.10, 0.20)


class Forwards:
    """Counts the DiT's forwards per row; one with a gradient is three, for its backward costs two,
    or one where only a LoRA learns. Evaluations are not counted."""

    def __init__(self, lora=False):
        self.rows, self.on, self.graded = 0, True, 2 if lora else 3
        self.handle = register_module_forward_pre_hook(self.count)

    def count(self, module, inputs):
        if self.on and isinstance(module, MMDiT):
            self.rows += len(inputs[0]) * (self.graded if torch.is_grad_enabled() else 1)

    @contextmanager
    def off(self):
        self.on = False
        yield
        self.on = True


def reached(curve, gain):
    """curve [(seconds, score)] -> seconds until two evaluations in a row are `gain` above the first
    one, or None."""
    goal = curve[0][1] + gain
    return next((b[0] for a, b in zip(curve[1:], curve[2:]) if min(a[1], b[1]) >= goal), None)


def play(flags):
    sys.argv = ["grpo.py", *told(grpo.Args, flags, flags["out"])]
    grpo.main()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ours(a, args, folder, **flags):
    """grpo.py's main, as a user runs it. -> curve of (seconds, score with the run's guidance, score
    without), rows with s_*, forwards per image"""
    forwards = Forwards(bool(flags.get("lora_rank")))
    flags, told = dict(init=a.init, out=folder, seed=a.seed, eval_every=a.eval_every) | flags, []
    plain = []

    def history():                                           # -> logged rows, curve
        rows, curve, at = [json.loads(line) for line in open(folder / "log.jsonl")], [], 0.0
        for r in rows:
            at += sum(r.get("s_" + p, 0) for p in PARTS)
            if "score" in r:
                curve.append((at, r["score"], plain[len(curve)]))
        return rows, curve

    def look(draw, n=4, limit=None, png=None):
        with forwards.off():
            r = bench_shapes(draw, n, limit, png)
            guided = draw.keywords["guidance"] != 1
            plain.append(bench_shapes(partial(draw, guidance=1.0), n, limit)["score"] if guided else
                         r["score"])
        if not told and (folder / "log.jsonl").exists():     # seen one evaluation late
            rows, curve = history()
            if sum(r.get("s_" + p, 0) for r in rows for p in PARTS) > 60 * a.minutes or all(
                    reached([(c[0], c[i]) for c in curve], GAINS[-1]) for i in (1, 2)):
                os.kill(os.getpid(), signal.SIGTERM)         # main finishes its step and saves
                told.append(1)                               # a second one would kill
        return r
    eval_py.bench_shapes = look
    play(flags)
    eval_py.bench_shapes = bench_shapes
    forwards.handle.remove()
    (_, *rows), curve = history()
    return curve, rows, forwards.rows / (len(rows) * args.B * args.G)


def theirs(a, args, guidance, trained, seconds, eta=0.7, updates=2, clip=None, drop=True, its=10**6,
           look=None):
    """The plain loop; `trained` are step indices. -> as `ours`"""
    _, _, device = setup()
    model = Unified.from_preset(args.preset, a.init).to(device)
    model.dit.requires_grad_(True)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    opt = torch.optim.AdamW(params.values(), lr=args.lr, betas=(0.9, 0.99), weight_decay=args.wd)
    ema = Ema(params, args.ema)
    ts = sigmas(args.T, model.cfg.sample_shift, args.grid or model.cfg.grid).tolist()
    metas, weights = read_prompts(args.prompts), read_weights(args.reward)
    forwards, curve, rows, N = Forwards(), [], [], args.B * args.G

    def velocity(x, t, c):                                   # c holds 2n rows: n null, n prompts
        if guidance == 1:
            return model.velocity(x, t, [(1.0, c)])
        null, v = model.velocity(torch.cat([x, x]), t, [(1.0, c)]).chunk(2)
        return null.detach() + guidance * (v - null.detach())

    def evaluate(at):
        with forwards.off(), ema.applied():
            curve.append((at, *(bench_shapes(lambda p, s: model.draw(p, s, args.eval_T, g), 1, 96)
                                ["score"] for g in dict.fromkeys((guidance, 1.0)))))

    spent, seen = 0.0, 0.0
    if look:
        evaluate(0.0)
    for it in range(its):
        g = keyed(key(a.seed, it, 0))
        chosen = torch.randperm(len(metas), generator=g)[: args.B].tolist()
        batch = [metas[i] for i in chosen for _ in range(args.G)]
        clock = [time.time()]
        with torch.no_grad():
            null = [model.cfg.null_prompt] * N if guidance != 1 else []
            c = model.encode(null + [m["prompt"] for m in batch])
            xs, old = [torch.randn(model.noise([0] * N).shape, generator=g).to(device)], []
            for k, (t, s) in enumerate(zip(ts, ts[1:])):
                v = velocity(xs[-1], t, c)
                x, logp, _, _ = sde_step(v, xs[-1], t, s, eta if k in trained else 0.0,
                                         noise=torch.randn(v.shape, generator=g).to(device))
                xs.append(x)
                old.append(logp)
        clock.append(time.time())
        images = model.to_images(xs[-1]).cpu()
        clock.append(time.time())
        r = score(images, batch, weights).values[:, 0].view(args.B, args.G)
        A = ((r - r.mean(1, keepdim=True)) / (r.std() + 1e-4)).flatten().clamp(-5, 5).to(device)
        clock.append(time.time())
        keep = torch.randperm(N, generator=g)
        if drop:                                             # Flow-GRPO does, its peers do not
            keep = keep[A[keep].abs().cpu() > 1e-6]
        for i in [i.to(device) for i in keep.chunk(updates) if len(i)]:
            cond = c.rows(torch.cat([i, i + N]) if guidance != 1 else i)
            for k in trained:
                v = velocity(xs[k][i], ts[k], cond)
                logp = sde_step(v, xs[k][i], ts[k], ts[k + 1], eta, x_next=xs[k + 1][i])[1]
                ratio = (logp - old[k][i]).exp()
                gain = torch.min(ratio * A[i], ratio.clamp(1 - clip, 1 + clip) * A[i])
                (-gain.mean() / len(trained)).backward()
            torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
            for group in opt.param_groups:
                group["lr"] = args.lr * min(1, (it + 1) / 5)
            opt.step()
            opt.zero_grad(set_to_none=True)
        ema.update(it)
        clock.append(time.time())
        rows.append({"s_" + p: y - x for p, x, y in zip(PARTS, clock, clock[1:])})
        spent += clock[-1] - clock[0]
        if look:
            if spent - seen >= look or spent >= seconds:
                evaluate(spent)
                seen = spent
                print(f"plain Flow-GRPO: step {it + 1}, {spent:.0f} s, reward {r.mean():.3f}, "
                      f"held out {curve[-1][1]:.3f}, without guidance {curve[-1][-1]:.3f}")
            if spent >= seconds or reached(curve, GAINS[-1]):
                break
    forwards.handle.remove()
    return curve, rows, forwards.rows / (len(rows) * N)


def recipes(a, folder):
    """Every recipe of RL: first what it costs, on few prompts and a reward that is never flat, so
    that no group drops out; then, as far as --minutes go, how soon it gains.

    The second part levels what belongs to the model and not to the recipe: batch, steps of the
    evaluation, reward, clip range in nats, and the learning rate where all weights learn."""
    photos = folder.parent / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(photos / f"{i}.png")
    (photos / "metadata.jsonl").write_text("".join(
        json.dumps(dict(file_name=f"{i}.png", prompt="noise")) + "\n" for i in range(8)))

    def show(name, *cells):
        print(f"{name:12}" + "".join(f"{x:>20}" for x in cells), flush=True)
    show("", "forwards per image", "images/s", *PARTS)
    for name, r in RECIPES.items():
        eval_py.bench_shapes = lambda *_, **__: dict(score=0.0, extra_rate=0.0, jpeg_kb=0.0)
        G, forwards = r.get("G", grpo.Args().G), Forwards(bool(r.get("lora_rank")))
        out = folder / f"{name}-cost"
        play(dict(recipe=name, init=a.init, out=out, steps=a.its, B=4, seed=a.seed,
                  reward="jpeg_compressibility", mix="", ldam="", sft_data=photos,
                  sft_batch=4 * G))
        forwards.handle.remove()
        _, *rows = [json.loads(line) for line in open(out / "log.jsonl")]
        middle, fast = speed(rows, 4 * G)
        show(name, f"{forwards.rows / (a.its * 4 * G):.1f}", f"{fast:.2f}",
             *(f"{x:.2f} s" for x in middle))

    args = grpo.Args()
    show("\nheld out", "updates", "s per update", "guidance", "start",
         *(f"s to +{gain:.2f}" for gain in GAINS))
    for name, r in RECIPES.items():
        own = dict(clip=r.get("clip", args.clip) * (16 * 64 * 64 / 1024 if r else 1),
                   lr=r["lr"] if r.get("lora_rank") else args.lr, reward=args.reward, mix="",
                   ldam="", B=args.B, G=args.G, eval_T=args.eval_T, steps=args.steps,
                   sft_batch=args.sft_batch, eval_every=a.eval_every if not r else 3)
        curve, rows, _ = ours(a, args, folder / name, recipe=name, **own)
        for i, guidance in ((1, r.get("guidance", 1.0)), (2, 1.0)):
            if i == 1 or "guidance" in r:
                show(name, len(rows), f"{sum(speed(rows, 1)[0]):.2f}", guidance,
                     f"{curve[0][i]:.3f}", *(said(gain, curve, i) for gain in GAINS))


def photos(folder, side, n):
    """n JPEGs, smooth with some grain as photos are, with metadata.jsonl in folder/folder and as
    a shard in folder/shards -> the files"""
    rng = np.random.default_rng(0)
    for kind in ("folder", "shards"):
        (folder / kind).mkdir(parents=True)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))
        image = np.array(small.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        image = (image + rng.integers(-8, 8, image.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / f"folder/{i}.jpg", quality=90)
        (folder / f"folder/{i}.txt").write_text(f"photo {i}")
    (folder / "folder/metadata.jsonl").write_text("".join(json.dumps(
        dict(file_name=f"{i}.jpg", prompt=f"photo {i}")) + "\n" for i in range(n)))
    with tarfile.open(folder / "shards/0.tar", "w") as tar:
        for i in range(n):
            for ending in ("jpg", "txt"):
                tar.add(folder / f"folder/{i}.{ending}", f"{i}.{ending}")
    return [folder / f"folder/{i}.jpg" for i in range(n)]


def loader(folder):
    """Pictures a second by plain Pillow in one thread, and by pairs, by the clock and by what
    processors had to do; how long a resume takes"""
    cfg, n = PRESETS["flow-grpo"], 8                     # 512 x 512

    def plainly(files):
        for file in files:
            with Image.open(file) as image:
                np.array(ImageOps.fit(image.convert("RGB"), (512, 512), Image.Resampling.LANCZOS))

    def cost(task):
        begin = time.time(), time.process_time()
        task()
        return time.time() - begin[0], time.process_time() - begin[1]
    for side, count in ((512, 400), (1024, 96)):
        files = photos(folder / f"{side}", side, count)
        ways = {f"{kind}, {workers} workers": pairs(folder / f"{side}" / kind, cfg, n, 0,
                                                    workers=workers)
                for kind in ("folder", "shards") for workers in (0, 1, 2)}
        for data in ways.values():
            next(data)
        # In turn, for a machine's speed wanders by a third; a worker is at most one processor.
        rounds = [(cost(lambda: plainly(files)), [
            cost(lambda: [next(data) for _ in range(count // n)]) for data in ways.values()])
            for _ in range(5)]
        plain = count / np.median([p[0] for p, _ in rounds])
        print(f"{side} px, plain Pillow: {plain:.0f} images/s")
        for i, name in enumerate(ways):
            print(f"{side} px, {name}: {count / np.median([w[i][0] for _, w in rounds]):.0f} "
                  "images/s; a processor's second has "
                  f"{np.median([p[1] / w[i][1] for p, w in rounds]):.2f} of Pillow's", flush=True)
    big, rows = folder / "512/folder/metadata.jsonl", 50_000
    big.write_text("".join(json.dumps(dict(file_name=f"{i % 400}.jpg", prompt=f"{i}")) + "\n"
                           for i in range(rows)))
    turn, at = divmod(100_000 * n, rows)
    place = dict(done=[(turn, turn * rows, at + rows // 2)], waiting=[])
    begin = time.time()
    next(pairs(big, cfg, n, 0, position=place))
    print(f"resume at step 100,000: {time.time() - begin:.1f} s")


def second_update(folder, **flags):
    """grpo.py in the classroom, without evaluations -> processor seconds of its second update"""
    at = []

    def record(self, *row):
        at.append(time.process_time())
        if len(at) == 2:
            raise Enough
    Recorder.look, Recorder.record = lambda self, step: None, record
    try:
        play(dict(out=folder / f"run{os.environ.get('RANK', '')}", init="data/shapes/sft") | flags)
    except Enough:
        return at[1] - at[0]


def there_and_back(kind, size):
    """The classroom's DiT, of that kind, with random weights: one image of size x size pixels
    forward and backward -> processor seconds of the second time"""
    cfg = PRESETS["shapes" if kind is MMDiT else "shapes-sana"]
    dit = MMDiT(**cfg.mmdit | dict(pos_embed_max_size=64)) if kind is MMDiT else SanaDiT(**cfg.sana)
    x, ctx = torch.randn(1, 4, size // 4, size // 4), torch.randn(1, 32, dit.context_dim)
    for _ in range(2):
        begin = time.process_time()
        dit(x, torch.full((1,), 0.5), ctx).square().mean().backward()
    return time.process_time() - begin


def linear(folder):
    """What an update costs against the group's size, the number of ranks and the resolution: its
    processor seconds, and the memory by which a process grew; each in a process of its own"""
    def say(what, n, seconds, grown):
        print(f"| {what} | {n} | {seconds:.2f} | {grown / 2**20:,.0f} |", flush=True)

    def run(name, env=(), **flags):
        return Apart(metered, partial(second_update, folder / name, **flags), log=folder / "log",
                     **dict(env))
    print("| | | processor seconds | MB more |\n|---|---|---|---|")
    for G in (4, 8, 16, 32):
        seconds, _, grown = run(f"G{G}", B=1, G=G, micro=12).answer(600)
        say("images of a prompt, 12 rows a backward", G, seconds, grown)
    for world in (1, 2, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]),
                         WORLD_SIZE=str(world))
        jobs = [run(f"world{world}", env=place | dict(RANK=str(r), LOCAL_RANK=str(r)), B=2 * world,
                    G=8, micro=12) for r in range(world)]
        answers = [job.answer(600) for job in jobs]
        say("ranks, each of 2 prompts x 8 images; seconds of all, MB of one", world,
            sum(a[0] for a in answers), max(a[2] for a in answers))
    for kind in (MMDiT, SanaDiT):
        for size in (256, 512, 768, 1024):
            job = Apart(metered, there_and_back, kind, size, log=folder / "log")
            seconds, _, grown = job.answer(600)
            say(f"pixels of a side, {kind.__name__}", size, seconds, grown)


def said(gain, curve, column=1):
    """When the curve showed a gain, or how near it came."""
    at = reached([(c[0], c[column]) for c in curve], gain)
    best = max(c[column] for c in curve) - curve[0][column]
    return f"{at:.0f}" if at else f"not in {curve[-1][0]:.0f} (best {best:+.2f})"


def speed(rows, N):
    """Median seconds of each part, and images per second."""
    middle = [sorted(r["s_" + p] for r in rows)[len(rows) // 2] for p in PARTS]
    return middle, N / sum(middle)


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=20,
                   help="of training, for our run, or each recipe's")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--init", default="data/shapes/sft")
    p.add_argument("--eval-every", type=int, default=10, help="our updates between evaluations")
    p.add_argument("--recipes", action="store_true", help="what each recipe costs and gains")
    p.add_argument("--its", type=int, default=3, help="iterations of each recipe")
    p.add_argument("--loader", action="store_true", help="how fast pictures are read")
    p.add_argument("--linear", action="store_true", help="how cost grows")
    a = p.parse_args()
    if a.linear:
        return linear(Path(tempfile.mkdtemp(prefix="bench-")))
    if a.loader:
        return loader(Path(tempfile.mkdtemp(prefix="bench-")))
    if a.recipes:
        print(f"{os.cpu_count()} cores, torch {torch.__version__}; 4 prompts, {a.its} iterations")
        return recipes(a, Path(tempfile.mkdtemp(prefix="bench-")) / "run")
    args = grpo.Args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}; grpo.py's defaults: {args}")
    N, latent = args.B * args.G, 4 * 16 * 16
    folder = Path(tempfile.mkdtemp(prefix="bench-")) / "run"

    # Throughput at identical settings: no guidance, as many trained steps, one optimiser step.
    loop = [theirs(a, args, 1.0, range(args.window), 0, args.eta, 1, args.clip, drop, its=6)[1][1:]
            for drop in (True, False)]
    curve, rows, F = ours(a, args, folder)
    look = a.eval_every * sum(speed(rows, N)[0])             # evaluated as often, in seconds
    limit = max(60 * a.minutes, 4 * (reached(curve, GAINS[-1]) or 0)) + look
    # 1e-4 of the 16 x 64 x 64 latents of SD3 at 512 px is 6.6 nats; the same in ours.
    their_curve, their_rows, their_F = theirs(
        a, args, 4.5, range(args.T - 1), limit, clip=1e-4 * 16 * 64 * 64 / latent, look=look)

    (mine, fast), (other, slow) = speed(rows, N), speed(their_rows, N)
    table = [("", "grpo.py", "plain Flow-GRPO"),
             ("forwards per image", f"{F:.1f}", f"{their_F:.1f}"),
             ("seconds per iteration", f"{sum(mine):.2f}", f"{sum(other):.2f}"),
             *((f"  {part}", f"{x:.2f}", f"{y:.2f}") for part, x, y in zip(PARTS, mine, other)),
             ("images per second", f"{fast:.1f}", f"{slow:.1f}"),
             ("held out at the start", f"{curve[0][1]:.3f}", f"{their_curve[0][1]:.3f}"),
             ("  same, no guidance", f"{curve[0][1]:.3f}", f"{their_curve[0][2]:.3f}")]
    for gain in GAINS:
        table += [(f"seconds to +{gain:.2f}", said(gain, curve), said(gain, their_curve)),
                  ("  same, no guidance", said(gain, curve), said(gain, their_curve, 2))]
    early = speed(rows[1:6], N)[1]                           # later, more groups agree
    table += [(name, f"{early:.1f} images/s", f"{x:.1f} ({early / x:.2f} x slower)")
              for name, x in zip(("identical settings", "  flat groups not dropped"),
                                 (speed(r, N)[1] for r in loop))]
    for row in table:
        print(f"{row[0]:30}{row[1]:>24}{row[2]:>24}")


if __name__ == "__main__":
    main()
