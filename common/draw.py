"""More ways to draw than from a prompt: after a thought, from a picture, after second looks."""

import torch
import torch.nn.functional as F

from common.words import answers, verdict

# Between the keys of a reflection's rounds. The generator heeds the low 32 bits of a key.
NEXT_ROUND = 1_000_003


@torch.no_grad()
def draw_thinking(model, prompts, seeds, steps=10, guidance=1.0, limit=64, temperature=1.0,
                  answer_only=False, size=None):
    """As draw, but that the VLM first reasons, and the DiT is told the prompt and its words, or
    the answer alone. -> uint8 (B,3,H,W), Words"""
    words = model.generate(prompts, None, "think", limit, temperature, keys=seeds)
    cond = (model.encode(answers(prompts, words)) if answer_only else
            model.encode(prompts, task="think", words=words))
    branches = model.guided(cond, guidance)
    return model.to_images(model.sample(branches, steps, noise=model.noise(seeds, size))), words


@torch.no_grad()
def draw_edits(model, prompts, images, seeds, steps=10, guidance=1.0, image_guidance=1.0,
               masks=None):
    """B instructions, B lists of uint8 (3,H,W) and B seeds -> uint8 (B,3,H,W), of the first
    image's size, which all rows share. masks: B of bool (H,W), True = may change; elsewhere
    the first image stays, pixel by pixel."""
    first = torch.stack([row[0] for row in images]).to(model.device)          # (B,3,H,W)
    size, f, keep = tuple(first.shape[2:]), model.cfg.vae_factor, None
    if masks is not None:
        masks = torch.stack(list(masks)).to(model.device)[:, None]            # (B,1,H,W)
        keep = model.to_latents(first), F.max_pool2d(masks.float(), f) == 0
    branches = model.edit_branches(prompts, images, guidance, image_guidance, seeds)
    new = model.to_images(model.sample(branches, steps, noise=model.noise(seeds, size), keep=keep))
    return new if masks is None else torch.where(masks, new, first)


@torch.no_grad()
def draw_reflecting(model, prompts, images, seeds, rounds=1, steps=10, guidance=1.0, limit=32):
    """Judge and redraw, up to `rounds` times: B prompts, uint8 images (B,3,H,W) and B seeds ->
    the last images (B,3,H,W), and for each a list of what was said, a critique a round. Who
    says yes, or neither yes nor no, keeps the image and is not asked again. Words are the
    likeliest ones."""
    images, said, todo = images.clone(), [[] for _ in prompts], list(range(len(prompts)))
    for r in range(rounds):
        looks = model.look([[images[b]] for b in todo])
        words = model.generate([prompts[b] for b in todo], looks, "critique", limit, 0)
        for b, text in zip(todo, words.texts):
            said[b].append(text)
        no = [i for i, text in enumerate(words.texts) if verdict(text)[0] is False]
        todo = [todo[i] for i in no]
        if not todo:
            break
        asked, shows = [prompts[b] for b in todo], [looks[i] for i in no]
        keys = [seeds[b] + NEXT_ROUND * r for b in todo]
        cond = model.encode_edit(asked, shows, keys, "critique", words.rows(no))
        branches = model.guided(cond, guidance, shows, "critique")
        noise = model.noise(keys, tuple(images.shape[2:]))
        images[todo] = model.to_images(model.sample(branches, steps, noise=noise)).to(images)
    return images, said
