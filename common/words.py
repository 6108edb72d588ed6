"""Words of the language model: how they become tokens, and what is read in them."""

import re
from itertools import groupby

import torch
END = "<|im_end|>"                             # of a turn, in the chats of Qwen2.5 and InternVL3


def spans(text):
    """Words by their tags -> dict(think, answer, ok): the first closed pair of each tag, "" without
    one; ok: one <think> </think>, then one <answer> </answer>, and nothing else."""
    def first(tag):
        found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.S)
        return found[1].strip() if found else ""
    tags = re.findall("</?(?:think|answer)>", text)
    ok = tags == ["<think>", "</think>", "<answer>", "</answer>"] and re.fullmatch(
        r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", text, re.S)
    return dict(think=first("think"), answer=first("answer"), ok=bool(ok))


def answers(prompts, words):
    """What is to be drawn, by the words alone: their answers; the prompt where there is none."""
    return [spans(text)["answer"] or p for p, text in zip(prompts, words.texts, strict=True)]


def verdict(text):
    """A critique -> does it say yes (True), no (False) or neither (None); and is it well formed:
    yes, or no and a reason?"""
    says = re.match(r"\s*(yes|no)\b(\W+\w)?", text, re.IGNORECASE)
    if not says:
        return None, False
    yes = says[1].lower() == "yes"
    return yes, yes or bool(says[2])


def special_names(tokenizer):
    """A pattern of the names of special tokens, such as <|im_end|>. Someone who writes one in a
    prompt means its letters: as a token it would end the turn, or ask for an image. One sign is no
    name: SD3's second tokenizer pads with "!"."""
    names = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    names = sorted((n for n in names if len(n) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)", re.IGNORECASE)


def token_rows(tokenizer, texts, **options):
    """Texts -> lists of tokens, by one of transformers' tokenizers; special_names are letters."""
    names = special_names(tokenizer)
    return [tokenizer(text, split_special_tokens=bool(names.search(text)), **options)["input_ids"]
            for text in texts]


def mrope(ids, image_id, grids):
    """Qwen2.5-VL's position ids (3,L) of one row: time, row, column. Text counts on, alike in all
    three; an image's tokens share a time and count rows and columns from there; text goes on past
    the longer side. grids: (rows, columns) of each image."""
    pos, start, grids = [], 0, iter(grids)
    for is_image, run in groupby(ids, lambda i: i == image_id):
        if is_image:
            rows, columns = next(grids)
            place = torch.cartesian_prod(
                torch.arange(1), torch.arange(rows), torch.arange(columns)).T    # (3,n)
            step = max(rows, columns)
        else:
            step = len(list(run))
            place = torch.arange(step).expand(3, -1)
        pos.append(start + place)
        start += step
    return torch.cat(pos, 1)


def answer_of(text):
    """What words say in the end: within <answer>, or all; case and full stop are nothing."""
    said = spans(text)["answer"] if "<answer>" in text else text
    return said.strip().removesuffix(".").lower()


def draw_token(logp, u, top_p):
    """logp (B,V) and u (B,) uniform in [0,1) -> (B,) where u falls along the distribution, or along
    the likeliest tokens whose mass reaches top_p. By inversion: one number a token, not V."""
    p = logp.double().exp()
    if top_p < 1:
        sorted_p, order = p.sort(1, descending=True)
        beyond = sorted_p.cumsum(1) - sorted_p >= top_p
        p = p.masked_fill(beyond.scatter(1, order, beyond), 0)
    mass = p.cumsum(1)
    return torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True)[:, 0]
