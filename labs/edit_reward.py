"""A judge of edits that learns (UniPic2's Skywork-EditReward): `cycle_edit.py --reward edit_model`.

    python labs/edit_reward.py --lr 1e-3                    # the classroom's edits
    torchrun labs/edit_reward.py --preset unipic2 --data scored.jsonl --vlm-lora-rank 64

A VLM reads source, edited image and instruction; of the state after the last token a linear layer
makes a score. One iteration:

    1  draw scored edits, and regress on their scores
    2  one step, warm-up then cosine; the average follows
    3  log; now and then the order that it gives to held-out edits (Spearman's correlation)

--data: jsonl of `source`, `edited`, `instruction`, `score`, a tenth of it held out; else edits of
the classroom, scored by its checker with noise. Removed against sft.py: the DiT, and with it
pictures to draw, flow matching and guidance.
"""

import copy
import random
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # noqa: E402
from peft import inject_adapter_in_model  # noqa: E402

import sft  # noqa: E402
from common.checkpoint import Trained  # noqa: E402
from common.data import Broken  # noqa: E402
from common.flags import DATA, flag, fork, parse  # noqa: E402
from common.presets import preset  # noqa: E402
from common.record import Recorder, check_out  # noqa: E402
from common.run import (Finite, adamw, descend, fail, key, same_start, setup,  # noqa: E402
                        slices)
from common.stop import this_rank  # noqa: E402
from common.weights import adapter, computed_again  # noqa: E402
from rewards.edit import EditReward  # noqa: E402
from rewards.scored import draw_scored, opened, scored_edits, spearman  # noqa: E402

REMOVED = ("task", "init", "edits", "columns", "train", "lora_rank", "lora_alpha", "drop",
           "edit_share", "edit_drop", "refs", "tuples", "share", "lm_loss", "dit", "vae", "compile",
           "shard", "workers", "cache", "keep")
Args = fork(
    sft.Args, REMOVED,
    data=flag("", "jsonl of scored edits; empty: the classroom's, made anew", DATA,
              group="A judge of edits"),
    out=flag("out/reward", "folder of the run"),
    micro=flag(0, "edits per backward; 0: all. The gradients are equal", "[0, 1e5]"),
    checkpoint=flag(False, "less memory: the language model is computed again in the backward "
                    "pass"))


def predict(model, examples):
    """-> the model's scores (n,) of examples, whose images are arrays"""
    olds, news, says, _ = zip(*examples)
    return model(list(olds), list(news), list(says))


def reward_model(args, device):
    """An EditReward of which the head and the VLM, or a LoRA on it, learn."""
    model = EditReward(args.vlm or preset(args.preset).vlm).requires_grad_(False)
    model.head.requires_grad_(True)
    torch.manual_seed(args.seed)                         # all ranks start from the same adapter
    if args.vlm_lora_rank:
        inject_adapter_in_model(adapter("vlm", args.vlm_lora_rank, args.vlm_lora_alpha,
                                        args.vlm_lora_dropout), model.vlm)
    else:
        model.vlm.model.requires_grad_(True)
    if args.checkpoint:
        computed_again(model.vlm.model.language_model.layers)
    return same_start(model.to(device))


def save_reward(model, ema, folder, step, score=None):
    """-> a function for rank 0 that writes the reward model's own folder, of the averaged weights
    as they are now"""
    if this_rank() == 0:
        with ema.applied():
            return partial(copy.deepcopy(model).cpu().save, folder)


def judged(model, held, file):
    """-> the order that the model gives to held-out edits, against that of their scores"""
    model.eval()
    with torch.no_grad():
        said = torch.cat([predict(model, held[i : i + 64]).cpu() for i in range(0, len(held), 64)])
    return dict(spearman=spearman(said.numpy(), [e[-1] for e in held]))


def main():
    args = parse(Args, __doc__)
    rank, world, device = setup()
    check_out(args)
    if args.batch % world:
        fail(f"--batch {args.batch} cannot be shared by {world} ranks")
    cfg, broken = preset(args.preset), Broken(args.data, 0.1)
    rows, held = scored_edits(args.data, args.preset)
    held, model = opened(held, cfg, broken), reward_model(args, device)
    trained = Trained(args, model, adamw(model, args), partial(save_reward, model))
    finite = Finite()
    recorder = Recorder(args, rank, trained, partial(judged, model, held), "spearman", first=False)
    for step in recorder.steps():
        # 1  draw scored edits, and regress on their scores
        rng = random.Random(key(args.seed, step, 0))             # every rank draws alike
        examples = draw_scored(rows, args.batch, rng, cfg, broken)[rank::world]
        torch.manual_seed(key(args.seed, step, rank))            # an adapter's dropout
        model.train()
        score = torch.tensor([e[-1] for e in examples], device=device)           # (n,)
        loss = 0.0
        for i in slices(len(examples), args.micro):
            part = (predict(model, examples[i]) - score[i]).square().sum() / args.batch
            part.backward()
            loss += part.detach()

        # 2  one step, warm-up then cosine down to a 25th; the average follows
        norm = descend(trained, finite, args, step, loss, [e[2] for e in examples])

        # 3  now and then the order that it gives to held-out edits, and a place to restart
        recorder.record(step, dict(loss=loss.item() * world),
                        dict(grad_norm=norm, **finite.column()),
                        [["loss"], ["grad_norm"], ["spearman"]])


if __name__ == "__main__":
    main()
