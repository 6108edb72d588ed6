"""Words of the language model: what it is told, how it answers, what is read in its answers."""

import re
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

END = "<|im_end|>"                             # of a turn, in the chats of Qwen2.5 and InternVL3


@dataclass
class Words:
    """What the language model said to B prompts: the actions of its policy."""

    ids: torch.Tensor                           # (B,L) right-padded
    mask: torch.Tensor                          # (B,L) True = chosen by the policy, END included
    logp: torch.Tensor                          # (B,L) fp32, tempered and untruncated; pads 0
    texts: list                                 # B str, without special tokens
    closed: torch.Tensor                        # (B,) False: cut off at the limit

    def rows(self, index):
        """index: a slice, a list, or a tensor of integers or of bools."""
        at = torch.arange(len(self.texts))[index.cpu() if torch.is_tensor(index) else index]
        return Words(self.ids[index], self.mask[index], self.logp[index],
                     [self.texts[i] for i in at], self.closed[index])


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
    return said.strip().removesuffix(".").strip().lower()


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


def chat(cfg, prompt, task, lengths):
    """What the VLM reads before the queries, or before it answers; lengths: tokens of each
    image. Written out here, since the chat templates of tokenizers change."""
    draws = task in ("t2i", "edit")
    text, null = getattr(cfg, f"{task}_text"), cfg.null_prompt
    if prompt is None and task == "edit":
        null = cfg.null_edit
    elif prompt is None and cfg.null == "turn":
        text = "{}"
    start, pad, end = cfg.image_tokens
    images = "".join(start + pad * n + end for n in lengths)
    user = text.format(null if prompt is None else prompt, images=images)
    system = f"<|im_start|>system\n{cfg.system}{END}\n" if cfg.system else ""
    return (f"{system}<|im_start|>user\n{user}{END}\n<|im_start|>assistant\n"
            + cfg.suffix * draws)


def chat_ids(cfg, tokenizer, prompt, task, lengths):
    """The tokens of `chat`. Of a prompt special_names are letters: what stands before and
    behind it, whose own are special, is then read apart."""
    ours = partial(tokenizer, add_special_tokens=False)
    if not special_names(tokenizer).search(prompt or ""):
        return ours(chat(cfg, prompt, task, lengths))["input_ids"]
    before, after = chat(cfg, "\0", task, lengths).split("\0")
    theirs, = token_rows(tokenizer, [prompt], add_special_tokens=False)
    return ours(before)["input_ids"] + theirs + ours(after)["input_ids"]


def spell(model, texts):
    """Texts as if they had been generated, with log-probs 0 -> Words. None: nothing, no END. Of
    a text's special_names are letters."""
    end = model.tokenizer.convert_tokens_to_ids(END)
    rows = token_rows(model.tokenizer, [t or "" for t in texts], add_special_tokens=False)
    ids = [torch.tensor([] if t is None else [*row, end], dtype=torch.long)
           for t, row in zip(texts, rows)]
    mask = pad_sequence([torch.ones_like(i, dtype=torch.bool) for i in ids], batch_first=True)
    ids = pad_sequence(ids, batch_first=True, padding_value=model.tokenizer.pad_token_id)
    return Words(ids.to(model.device), mask.to(model.device),
                 torch.zeros(ids.shape, device=model.device), list(texts),
                 torch.ones(len(ids), dtype=torch.bool, device=model.device))


def decode(vlm, tokenizer, x, pos, lengths, u, temperature, top_p):
    """Answers to prompts, token by token. x (P,L,d), pos and lengths: of each prompt, embeddings
    and their places; u (B,limit) uniform in [0,1): one number a token, of B / P answers to each
    prompt, in a row -> Words of B rows"""
    lm, device, limit = vlm.model.language_model, u.device, u.shape[1]
    end, last = tokenizer.convert_tokens_to_ids(END), torch.tensor(lengths, device=device) - 1
    real = torch.arange(x.shape[1], device=device) <= last[:, None]                      # (P,L)
    rows = torch.arange(len(x), device=device)
    ids = torch.full(u.shape, tokenizer.pad_token_id, device=device)             # (B,limit) each
    mask, logps = torch.zeros_like(ids, dtype=torch.bool), torch.zeros(u.shape).to(device)
    # Prompts are read once, padded on the right; the pads in the cache stay masked. Then a row is
    # what some answers have in common so far: an answer that has ended, or says the same as
    # another, costs nothing more.
    out = lm(inputs_embeds=x, position_ids=pos, attention_mask=None, use_cache=True)
    cache, h = out.past_key_values, out.last_hidden_state[rows, last]                    # (R,d)
    pos = pos[..., rows, last]
    going = torch.arange(len(u), device=device)
    of = rows.repeat_interleave(len(u) // len(x))
    for i in range(limit):
        logp = (vlm.lm_head(h).float() / (temperature or 1)).log_softmax(1)              # (R,V)
        token = (logp.argmax(1)[of] if temperature == 0 else
                 draw_token(logp[of], u[going, i], top_p))
        ids[going, i], mask[going, i], logps[going, i] = token, True, logp[of, token]
        stay = (token != end).nonzero()[:, 0]
        all_stay, going = len(stay) == len(going), going[stay]
        if i + 1 == limit or not len(going):
            break
        said, of = (of * logp.shape[1] + token)[stay].unique(return_inverse=True)
        row, token = said // logp.shape[1], said % logp.shape[1]                         # (R,)
        if not all_stay or len(row) != len(h):   # else each row goes on, and in one way
            cache.batch_select_indices(row)
            real, pos = real[row], pos[..., row]
        real = F.pad(real, (0, 1), value=True)
        out = lm(inputs_embeds=lm.get_input_embeddings()(token)[:, None],
                 position_ids=(pos + i + 1)[..., None], attention_mask=real,
                 past_key_values=cache, use_cache=True)
        h = out.last_hidden_state[:, 0]
    ids, mask, logps = (a[:, : i + 1].contiguous() for a in (ids, mask, logps))          # (B,L)
    closed = torch.ones(len(u), dtype=torch.bool, device=device)
    closed[going] = False
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Words(ids, mask, logps, texts, closed)
