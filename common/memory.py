"""What a run will hold in memory, computed from shapes and flags before any weight is loaded.

It is what a run always holds, and the most that one of its phases adds: an update, a rollout, a
look at pictures. tests/test_memory.py compares it with tensors of full size that hold no numbers;
no GPU has been asked yet.
"""

import math
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist

from common.layers import blocks_of
from common.run import learning

# In bytes, as tests/fake_gpu.py measures them in bf16; in fp32 it is FP32 times as much.
# KEPT: what a backward keeps per token, layer and width of a part through which gradients only
# pass, whose LoRA learns, or which learns itself (and then keeps each of its weights in bf16, too).
KEPT = {"mmdit": dict(frozen=53, lora=51, whole=74),
        "sana": dict(frozen=74, lora=90, whole=100),
        "sana with norms": dict(frozen=84, lora=104, whole=117),         # SANA-1.5
        "vlm": dict(frozen=46, lora=70, whole=63),
        "bridge": dict(frozen=50, whole=50)}
SUMMARY = 13          # more of an MMDiT's LoRA if the bridge learns, which makes its modulations
INPUTS = 4.2          # of a layer that --checkpoint computes again
FP32 = 1.4
# Without a gradient: of a DiT per token and width, one layer's being held at a time; of VLM and
# bridge, whose states are wanted, also per layer; of the VAE per pixel
DIT, VLM, BRIDGE, VAE = 37, 12, 8, 2600
MOST, MOST_PIXELS = 2**27, 2**20      # tokens x width that a DiT has at once, pixels of the VAE
MOST_READ = 2**29     # tokens x width x layers of the VLM
CHOICE = 24           # of a token that is drawn, per word of the vocabulary, in fp32 and fp64
PROMPT = 64           # tokens that a prompt with its chat, or a thought, is taken to have
SHOWN = 16            # pictures of a look
# Of models that rewards load, where photos are scored on this device; the judge is Qwen2.5-VL-7B.
MODELS = dict(clip=1.7e9, pickscore=3.9e9, hpsv2=3.9e9, detector=2.0e9, ocr=0.1e9, judge=16.6e9)
REWARDS = dict(clip="clip", clip_direction="clip", clip_image="clip", aesthetic="clip",
               pickscore="pickscore", hpsv2="hpsv2", geneval="detector", geneval_strict="detector",
               ocr="ocr", preference="judge", judge="judge", edit_judge="judge", cycle="clip")


def memory_plan(model, args, rows, reads, copies, device):
    """model: on the meta device, as it will be held and learn. rows: images per DiT backward;
    reads: prompts that the VLM reads with gradient; copies: parts whose initial weights are kept.
    -> {name: bytes} of what is always held; and of the phases, of which the largest counts"""
    world, shards = ranks_of(args)
    parts = spread_out(model) if shards > 1 else []
    spread, away = sum(p.nbytes for p in parts), 1 - 1 / shards      # away: what others have of it
    learn = learned(model)
    mine = learn - away * sum(p.numel() for p in parts if p.requires_grad)
    average = 4 * mine * bool(getattr(args, "ema", 1))
    follows = 4 * mine * bool(getattr(args, "old", 0) and getattr(args, "near", 1))   # of labs
    held = dict(weights=bytes_of(model) - away * spread, AdamW=8 * mine, average=average + follows,
                reference=sum(copy_of(getattr(model, part), model, device) for part in copies),
                rewards=rewards_of(model, args))
    graph, read = graph_of(model, args, rows, reads)
    # While pictures are looked at, the average displaces weights, and of --shard all are here.
    phases = dict(look=drawing(model, args, SHOWN, SHOWN) + average + spread)
    if hasattr(args, "G"):                 # RL, where --shard leaves weights and gradients whole
        prompts = -(-args.B // world)
        images = prompts * args.G * getattr(args, "images_per_thought", 1)
        # A reflection, and the way back of an edit, is each sample's own to read.
        each = hasattr(args, "task") or getattr(args, "reverse", "no") != "no"
        asked = prompts * (args.G if each else 1)
        path, draw = path_of(model, args, images), drawing(model, args, images, asked)
        if hasattr(args, "task"):            # words are drawn first, and then read without gradient
            read, draw = 0, max(draw, speaking(model, args, asked))
        # A lab's other policy takes the place of the weights, which are kept beside.
        phases["rollout"] = spread + follows + read + path + max(path, draw)
        phases["update"] = spread + 4 * learn + graph + 2 * path     # all of it, and what is taken
    else:
        # One backward frees its graph while gradients come; of several all but the first have both.
        both = sum if getattr(args, "micro", 0) else max
        phases["update"] = both([graph, 4 * mine]) + largest_block(model) * bool(parts)
    return held, phases


def ranks_of(args):
    """-> how many there are, and over how many of them --shard shares out: those of a node"""
    world = dist.get_world_size() if dist.is_initialized() else 1
    near = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return world, (near if 1 < near < world else world) if getattr(args, "shard", False) else 1


def spread_out(model):
    """-> the parameters of which --shard leaves a rank a part: see share_out"""
    return [p for part in (model.dit, model.bridge) if learning(part)
            for name, p in part.named_parameters() if not name.endswith("_queries")]


def learned(part):
    """-> how many numbers of a part, or of all, learn"""
    return sum(p.numel() for p in learning(part).values())


def bytes_of(part):
    """With its buffers; what has two names counts once."""
    return sum(t.nbytes for t in {*part.parameters(), *part.buffers()})


def copy_of(part, model, device):
    """Bytes of a frozen copy: see initial_policy"""
    size = 2 if model.bf16 and device.type == "cuda" else 4
    return size * sum(p.numel() for p in part.parameters()) + sum(b.nbytes for b in part.buffers())


def largest_block(model):
    """Bytes that --shard gathers: two blocks of the DiT at a time, and their gradients"""
    return 4 * 4 * max(sum(p.numel() for p in block.parameters())
                       for block in blocks_of(model.dit))


def rewards_of(model, args):
    """Bytes of the models that score, but for a judge at an endpoint; the classroom's are small."""
    text = getattr(args, "reward", "")
    if model.cfg.preset.startswith("shapes") or words_alone(args):
        return 0
    text = Path(text).read_text() if text.endswith(".json") else text
    needed = {REWARDS[name] for name in re.findall(r"\w+", text) if name in REWARDS}
    return sum(MODELS[name] for name in needed if name != "judge" or not args.judge_url)


def lengths(model, args):
    """-> tokens of the DiT's image, references included, of its context, of what the VLM reads"""
    cfg, dit, task = model.cfg, model.dit, getattr(args, "task", "")
    image = (cfg.size // cfg.vae_factor // dit.patch_size) ** 2
    edits = hasattr(args, "image_guidance") or getattr(args, "edits", "") or task == "reflect"
    if edits and dit.most_refs != 1 and cfg.refs in ("both", "dit"):
        image *= 2                                           # SANA adds its reference
    if model.vlm is None:
        return image, cfg.t5_tokens + 77, 0
    read = cfg.n_query + PROMPT + getattr(args, "limit", PROMPT * (task in ("cot", "reflect")))
    if edits and cfg.refs in ("both", "vlm") or task == "vqa":
        read += int(cfg.size * (cfg.vit_scale or 1) / 28) ** 2
    return image, cfg.n_query if cfg.keep == "query" else read, read


def branches(args):
    """How many forwards of the DiT a velocity is the sum of"""
    text, image = getattr(args, "guidance", 1), getattr(args, "image_guidance", None)
    if image is None:
        return 1 + (text != 1)
    return (text != 0) + (image != text) + (image != 1)


def in_layers(model, args, rows, prompts):
    """Rows that the DiT has, and prompts that VLM and bridge read -> (numbers, that is rows x
    tokens x width, and layers) of DiT, VLM and bridge"""
    cfg, dit, (image, context, read) = model.cfg, model.dit, lengths(model, args)
    tokens = image + context * (1 if joint(dit) else 0.1)
    sizes = [(rows * tokens * dit.width, cfg.dit_config.get("num_layers", 24)), (0, 0), (0, 0)]
    if model.vlm:
        lm, each = model.vlm.config.get_text_config(), len(cfg.layers) if cfg.bridge == "lim" else 1
        sizes[1:] = ((prompts * read * lm.hidden_size, lm.num_hidden_layers),
                     (prompts * context * cfg.c_dim, cfg.c_layers * each))
    return sizes


def joint(dit):
    """Is the context part of its sequence, as in an MMDiT, but not in SANA?"""
    return getattr(dit, "joint", True)


def kept(part, kind, numbers, layers, again=False):
    """Bytes that a backward keeps of a part's layers. again: --checkpoint, by which it keeps each
    layer's inputs, and all of the one that is computed again, for one of `again` forwards"""
    names = [name for name, p in part.named_parameters() if p.requires_grad]
    how = "frozen" if not names else "lora" if all("lora_" in name for name in names) else "whole"
    each = KEPT[kind][how]
    return numbers * (INPUTS * layers + each / again if again else each * layers)


def sana_kind(dit):
    """As which SANA a DiT is counted whose context is no part of its sequence"""
    return "sana with norms" if getattr(dit, "config", {}).get("qk_norm") else "sana"


def graph_of(model, args, rows, reads):
    """Bytes that the graph of a backward keeps. -> all, and of what was read alone"""
    dit, n, again = model.dit, branches(args), getattr(args, "checkpoint", False)
    drawn, said, passed = in_layers(model, args, rows * n, reads)
    kind = "mmdit" if joint(dit) else sana_kind(dit)
    graph, read = kept(dit, kind, *drawn, n * again), 0
    lora = any("lora_" in name for name, _ in dit.named_parameters())
    if joint(dit) and lora and learning(model.bridge) and not again:
        graph += SUMMARY * drawn[0] * drawn[1]
    if reads and model.vlm:
        read = kept(model.vlm, "vlm", *said, again) + kept(model.bridge, "bridge", *passed)
    if not model.bf16:
        return FP32 * (graph + read), FP32 * read
    parts = [dit] * bool(rows) + [model.vlm, model.bridge] * bool(read)
    cast = [2 * p.numel() for part in parts for p in part.parameters() if p.dtype == torch.float32]
    return graph + read + sum(cast), read


def speaking(model, args, samples):
    """Bytes of so many answers while they are generated: the VLM's cache of keys and values, and
    the odds of a next token"""
    lm, (_, _, read) = model.vlm.config.get_text_config(), lengths(model, args)
    width = lm.num_key_value_heads * (getattr(lm, "head_dim", None)
                                      or lm.hidden_size // lm.num_attention_heads)
    cache = 2 * read * width * lm.num_hidden_layers * (2 if model.bf16 else 4)
    return samples * (cache + CHOICE * lm.vocab_size) + 2 * learned(model.vlm) * model.bf16


def reading(model, args, prompts):
    """Bytes that VLM and bridge take to read prompts without a gradient, so many at a time"""
    if not model.vlm:
        return 0
    _, said, passed = in_layers(model, args, 0, prompts)
    said, passed = math.prod(said), math.prod(passed)
    share = min(1, MOST_READ / max(1, said))
    return share * (VLM * said + BRIDGE * passed) + 2 * learned(model.vlm) * model.bf16


def drawing(model, args, images, prompts):
    """Bytes that drawing takes without a gradient, where prompts are read, then the DiT draws, then
    the VAE decodes; of words alone that they take"""
    if words_alone(args):
        return speaking(model, args, images)
    drawn, context = in_layers(model, args, images, 0)[0], lengths(model, args)[1]
    told = 4 * images * context * model.dit.context_dim * branches(args)
    forward = DIT * min(drawn[0], MOST) + told + 2 * learned(model.dit) * model.bf16
    pixels = images * model.cfg.size**2
    return max(reading(model, args, prompts), forward,
               VAE * min(pixels, MOST_PIXELS) + 6 * pixels)  # as bytes, in parts and in one piece


def words_alone(args):
    """Does a run of reflect.py draw nothing?"""
    return getattr(args, "task", "") in ("text", "vqa")


def path_of(model, args, images):
    """Bytes of a rollout's trajectories; a lab keeps the pictures alone"""
    if words_alone(args):
        return 0
    latent = model.dit.latent_channels * (model.cfg.size // model.cfg.vae_factor) ** 2
    return 4 * (getattr(args, "window", 0) + 1) * images * latent


def memory_report(model, args, rows, reads, copies, device):
    """memory_plan as text and, where that does not fit, what would help"""
    held, phases = memory_plan(model, args, rows, reads, copies, device)
    count = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in (
        "vlm", "text_encoder", "bridge", "dit", "vae") if getattr(model, part) is not None}
    count["learning"] = learned(model)
    has = (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda"
           else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def gib(sizes):
        return "  ".join(f"{name} {size / 2**30:.1f}" for name, size in sizes.items())
    most = sum(held.values()) + max(phases.values())
    text = ["parameters  " + "  ".join(f"{name} {n / 1e6:,.1f} M" for name, n in count.items()),
            f"GiB, computed  {gib(held)}, and the largest of  {gib(phases)}: {most / 2**30:.1f} of "
            f"{has / 2**30:.1f} on {device.type}"]
    if most > has:
        text.append("this does not fit: try " + (", ".join(what_helps(
            args, max(phases, key=phases.get), copies)) or "another --preset"))
    return "\n".join(text)


def what_helps(args, phase, copies):
    """-> flags that lower what a run holds, of which its largest phase is this one"""
    has = {name: getattr(args, name, None) for name in ("micro", "batch", "checkpoint", "shard")}
    less = ["a lower --B"] * (phase == "rollout")
    if phase == "update":
        less += [f"a lower --{name}" for name in ("micro", "batch") if has[name] is not None]
        less += ["--checkpoint"] * (has["checkpoint"] is False)
    if getattr(args, "lora_rank", 1) == 0 and getattr(args, "train", "dit") != "bridge":
        less.append("--lora-rank 32")
    less += ["more ranks with --shard"] * (has["shard"] is False)
    return less + ["--beta 0"] * bool(copies)
