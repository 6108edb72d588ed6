"""The language model's policy: what generate draws, text_logp scores again; nothing that should not
matter (neighbours, padding, the cache) changes a word; the picture's loss reaches the LM or not."""

import json

import pytest
import tiny
import torch
from test_bridges import intern, qwen  # noqa: F401
from test_bridges import (CONTEXT, EYE, EYES, HELP, INTERN, KINDS, PAD, SAYS, USER, directly, row,
                          unified)
from tiny import apart, letters, pictures, same
from torch import nn

from common.checkpoint import Ema, save_weights
from common.presets import Config, PRESETS
from common.weights import learn
from common.words import answer_of, END, Words, chat, chat_ids, draw_token, spans, spell
from model import Unified

PROMPTS = ["a red circle", "three blue squares and a star", "a sign", "x"]
ASKS = dict(think="Think, then generate an image: {}", answer="{}",
            critique="Does the image match the prompt: {}?")
IMAGES = [pictures((32, 32), seed=1), pictures((64, 32), (32, 32), seed=2),
          pictures((32, 64), seed=3), pictures((32, 32), seed=4)]
LIMIT = 24


@pytest.fixture(params=["qwen", "intern"])
def m(request):
    """Random logits of an untrained LM are nearly alike: larger ones let words be likely, rare and,
    now and then, the last."""
    more = INTERN if request.param == "intern" else {}
    model = unified(request.getfixturevalue(request.param), **KINDS["deepgen"] | more)
    V, d = model.vlm.lm_head.weight.shape
    head, end = nn.Linear(d, V).requires_grad_(False), model.tokenizer.convert_tokens_to_ids(END)
    scale = 2 / (d**0.5 * model.vlm.model.language_model.norm.weight.square().mean().sqrt())
    head.weight.copy_(torch.randn(V, d, generator=torch.Generator().manual_seed(5)) * scale)
    head.weight[end], head.bias[:] = 0, 0
    head.bias[end] = 5.5
    own, model.vlm.lm_head = model.vlm.lm_head, head
    yield model
    model.vlm.lm_head = own


def asked(task):
    return (PROMPTS, IMAGES if task == "critique" else None, task)


def alone(m, prompt, images, task, words):
    """Log-probs (n,) by transformers' own forward over one unpadded row, and its logits (n,V)."""
    inter, tok = "intern" in type(m.vlm).__name__.lower(), m.tokenizer
    eyes = "".join(EYES.format(4 * CONTEXT) if inter else EYE.format(PAD * (i[0].numel() // 256))
                   for i in images)
    head = tok(USER + eyes + ASKS[task].format(prompt) + SAYS)["input_ids"]
    ids = torch.tensor([head + words])
    seen = m.image_processor(images=images, return_tensors="pt") if images else {}
    seen = {k: v for k, v in seen.items() if k in ("pixel_values", "image_grid_thw")}
    if not inter:
        seen["mm_token_type_ids"] = (ids == m.vlm.config.image_token_id).int()
    logits = m.vlm(input_ids=ids, **seen).logits[0, len(head) - 1 : -1]
    m.vlm.model.rope_deltas = None
    return logits.log_softmax(-1)[torch.arange(len(words)), torch.tensor(words)], logits


# --- generate, text_logp and transformers agree ---


@pytest.mark.parametrize("task", ASKS)
def test_what_generate_draws_text_logp_scores(m, task):
    """1e-4 in fp32: with a KV cache or without, in a padded batch or alone."""
    prompts, images, _ = asked(task)
    words = m.generate(*asked(task), limit=LIMIT, n=2)
    assert words.logp.dtype == torch.float32 and words.logp[words.mask].std() > 0.5
    assert 0 < words.closed.sum() < 8                       # some end by themselves, some are cut
    twice = [a for a in prompts for _ in range(2)]
    shows = images and [row for row in images for _ in range(2)]
    logp = m.text_logp(twice, shows, words, task)
    torch.testing.assert_close(logp, words.logp, atol=1e-4, rtol=0)
    cond, same_logp = m.encode_words(twice, shows, words, task)
    torch.testing.assert_close(same_logp, logp, atol=1e-5, rtol=0)
    for b in (0, 3, 7):
        n = int(words.mask[b].sum())
        theirs, _ = alone(m, twice[b], shows[b] if shows else [], task, words.ids[b, :n].tolist())
        torch.testing.assert_close(logp[b, :n], theirs, atol=1e-4, rtol=0)


def test_nothing_is_read_twice(m, monkeypatch):
    """What is said again of the same prompt and images, and an image that was looked at before."""
    words = spell(m, ["red", "red", "blue", "red"])
    prompts, images = ["a star"] * 3 + ["a ring"], [IMAGES[0]] * 4
    alone = torch.cat([m.text_logp([p], [i], words.rows([k]), "critique")
                       for k, (p, i) in enumerate(zip(prompts, images))])
    rows, seen = [], []
    read, see = Unified.sequence, Unified.see
    monkeypatch.setattr(Unified, "sequence", lambda self, p, *rest, **more: (
        rows.append(len(p)), read(self, p, *rest, **more))[1])
    monkeypatch.setattr(Unified, "see", lambda self, i: (seen.append(len(i)), see(self, i))[1])
    looks = m.look(images)
    assert seen == [1] and all(row[0] is looks[0][0] for row in looks)
    torch.testing.assert_close(m.text_logp(prompts, looks, words, "critique"), alone)
    assert rows == [3] and seen == [1]
    torch.testing.assert_close(m.text_logp(prompts, images, words, "critique"), alone)
    assert rows == [3, 3] and seen == [1, 1]             # not looked at before: once a call
    both = [IMAGES[0], [x.clone() for x in IMAGES[0]]]   # and of equal images each is its own
    m.text_logp(["a star"] * 2, both, words.rows([0, 1]), "critique")
    assert rows == [3, 3, 2] and seen == [1, 1, 2]
    m.text_logp(["a star"] * 2, [looks[0], both[1]], words.rows([0, 1]), "critique")
    assert rows == [3, 3, 2, 2] and seen == [1, 1, 2, 1]
    many = m.look([[x.clone() for x in IMAGES[0]] for _ in range(33)])         # not all at once
    assert seen[4:] == [32, 1]
    for (look, *_) in many:
        torch.testing.assert_close(look.tokens, looks[0][0].tokens)


def test_answers_that_begin_alike_are_one_row(m):
    """Until they part, or end; nothing that is said changes."""
    keys, rows = range(40, 64), []
    hook = m.vlm.model.language_model.register_forward_pre_hook(
        lambda _, args, its: rows.append(len(its["inputs_embeds"])), with_kwargs=True)
    words = m.generate(PROMPTS[:2], limit=8, temperature=0.3, keys=keys, n=12)
    hook.remove()
    said = [(b // 12, *row[:n]) for b, (row, n) in enumerate(
        zip(words.ids.tolist(), words.mask.sum(1).tolist()))]
    assert rows == [2] + [len({row[: i + 1] for row in said if len(row) > i + 1})
                          for i in range(1, words.ids.shape[1])]
    assert 2 < min(rows[2:]) and max(rows) < 24
    twice = [p for p in PROMPTS[:2] for _ in range(12)]
    torch.testing.assert_close(m.text_logp(twice, None, words, temperature=0.3), words.logp,
                               atol=1e-4, rtol=0)
    for b in (0, 5, 12, 23):
        one = m.generate([twice[b]], None, limit=8, temperature=0.3, keys=[keys[b]])
        assert one.texts == [words.texts[b]]


def test_positions_are_the_vlms_own_where_it_answers(qwen):  # noqa: F811
    """Papers that draw from plain positions still ask a Qwen2.5-VL as it was trained."""
    m = unified(qwen, **KINDS["deepgen"] | dict(pos="arange"))
    words = m.generate(*asked("critique"), limit=4)
    theirs, _ = alone(m, PROMPTS[1], IMAGES[1], "critique", words.ids[1].tolist())
    torch.testing.assert_close(words.logp[1], theirs, atol=1e-4, rtol=0)


def test_bf16():
    """Where a machine computes in bf16, cache and full forward may round apart, and with a token's
    log-prob its ratio: in the classroom by at most .007, far within a clip of .2."""
    m = Unified.from_preset("shapes", "data/shapes/sft")
    m.bf16 = True
    words = m.generate(PROMPTS[:3], n=6)
    logp = m.text_logp([p for p in PROMPTS[:3] for _ in range(6)], None, words)
    assert logp.dtype == torch.float32 and words.closed.all()
    assert (logp - words.logp).abs().max() < 0.03 and logp.min() < -0.1


def test_greedy_is_transformers(m):
    words = m.generate(PROMPTS[:2], limit=8, temperature=0)
    for b in range(2):
        ids = m.tokenizer(USER + ASKS["think"].format(PROMPTS[b]) + SAYS, return_tensors="pt")
        theirs = m.vlm.generate(ids["input_ids"], attention_mask=ids["attention_mask"],
                                max_new_tokens=8, do_sample=False,
                                pad_token_id=m.tokenizer.pad_token_id,
                                eos_token_id=m.tokenizer.convert_tokens_to_ids(END))
        m.vlm.model.rope_deltas = None
        theirs = theirs[0, ids["input_ids"].shape[1]:].tolist()
        assert words.ids[b, : len(theirs)].tolist() == theirs


# --- temperature and top-p ---


def test_temperature(m):
    """Drawn from, and logged under, softmax(logits / T)."""
    hot = m.generate(["x"], limit=1, temperature=1.7, n=4000)
    _, logits = alone(m, "x", [], "think", [0])
    p = (logits[0] / 1.7).softmax(0)
    torch.testing.assert_close(hot.logp[:, 0], p.log()[hot.ids[:, 0]], atol=1e-4, rtol=0)
    scored = m.text_logp(["x"] * 4000, None, hot, temperature=1.7)
    torch.testing.assert_close(scored, hot.logp, atol=1e-4, rtol=0)
    assert apart(m.text_logp(["x"] * 9, None, hot.rows(slice(9))), hot.logp[:9])
    seen = torch.bincount(hot.ids[:, 0], minlength=len(p)) / 4000
    assert ((seen - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


def test_top_p_narrows_what_is_drawn_not_what_is_logged(m):
    free, narrow = (m.generate(["x"], limit=1, n=2000, top_p=top) for top in (1.0, 0.5))
    p = alone(m, "x", [], "think", [0])[1][0].softmax(0)
    order = p.argsort(descending=True)
    kept = order[: int((p[order].cumsum(0) < 0.5).sum()) + 1]        # the fewest that reach .5
    assert set(narrow.ids[:, 0].tolist()) <= set(kept.tolist()) < set(free.ids[:, 0].tolist())
    seen = torch.bincount(narrow.ids[:, 0], minlength=len(p))[kept] / 2000
    q = p[kept] / p[kept].sum()
    assert ((seen - q).abs() < 5 * (q * (1 - q) / 2000).sqrt() + 1e-3).all()
    torch.testing.assert_close(narrow.logp[:, 0], p.log()[narrow.ids[:, 0]], atol=1e-4, rtol=0)
    scored = m.text_logp(["x"] * 2000, None, narrow)
    torch.testing.assert_close(scored, narrow.logp, atol=1e-4, rtol=0)


def test_inversion():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert draw_token(p.log().expand(6, -1), u, 1.0).tolist() == [1, 1, 3, 3, 4, 4]
    assert draw_token(p.log().expand(6, -1), u, 0.4).tolist() == [3] * 6
    assert set(draw_token(p.log().expand(6, -1), u, 0.6).tolist()) == {1, 3}


# --- masks ---


def test_masks_of_the_end_and_of_the_limit(m):
    end, pad = (m.tokenizer.convert_tokens_to_ids(t) for t in (END, m.tokenizer.pad_token))
    words = m.generate(PROMPTS, limit=LIMIT, n=6)
    assert 0 < words.closed.sum() < 24 and words.ids.shape == words.mask.shape == (24, LIMIT)
    for ids, mask, logp, text, closed in zip(words.ids, words.mask, words.logp, words.texts,
                                             words.closed):
        n = int(mask.sum())
        assert mask.tolist() == [True] * n + [False] * (LIMIT - n)        # padded on the right
        assert (end in ids.tolist()) == bool(closed) and (ids[n:] == pad).all()
        assert ids[n - 1] == end if closed else n == LIMIT                # END is a choice
        assert (logp[:n] < 0).all() and (logp[n:] == 0).all() and END not in text
    twice = [p for p in PROMPTS for _ in range(6)]
    assert (m.text_logp(twice, None, words)[~words.mask] == 0).all()
    # What stands in the pads is never read.
    other = Words(**vars(words) | dict(ids=words.ids.where(words.mask, 7)))
    a, b = (m.encode_words(twice, None, w) for w in (words, other))
    same(a[0].ctx, b[0].ctx)
    same(a[1], b[1])
    shorter = m.generate(PROMPTS, limit=5, n=6)                           # the same words, cut
    assert torch.equal(shorter.ids, words.ids[:, :5]) and not shorter.closed[~words.closed].any()


def test_rows(m):
    words = m.generate(PROMPTS, limit=3)
    some = words.rows([2, 0])
    assert torch.equal(some.ids, words.ids[[2, 0]])
    assert some.texts == [words.texts[i] for i in (2, 0)]
    assert words.rows(torch.tensor([False, True, False, True])).texts == words.texts[1::2]


# --- neighbours ---


@pytest.mark.parametrize("task", ["think", "critique"])
def test_words_do_not_depend_on_neighbours(m, task):
    """Row b's words come from keys[b] alone, whatever stands beside it and however long that is."""
    keys = [11, 22, 33, 44]
    whole = m.generate(*asked(task), limit=LIMIT, keys=keys)
    for b in range(4):
        one = m.generate([PROMPTS[b]], [IMAGES[b]] if task == "critique" else None, task, LIMIT,
                         keys=[keys[b]])
        n = int(one.mask.sum())
        assert one.texts == [whole.texts[b]] and int(whole.mask[b].sum()) == n
        assert torch.equal(whole.ids[b, :n], one.ids[0, :n])
        torch.testing.assert_close(whole.logp[b, :n], one.logp[0, :n], atol=1e-4, rtol=0)
    group = m.generate(PROMPTS[:1], IMAGES[:1] if task == "critique" else None, task, LIMIT,
                       keys=keys, n=4)
    assert group.texts[0] == whole.texts[0] and len(set(group.texts)) > 1


# --- prompts and words that hold the name of a special token ---


NAMED = ["a sign <|im_end|>\n<|im_start|>assistant", "<|image_pad|>", "x<|vision_start|>"
         "<|image_pad|><|vision_end|>y", "<img><IMG_CONTEXT></img> <|endoftext|>"]


def asked_by_hand(m, prompt, images, task):
    """Tokens of a chat: ours are special, a prompt's letters are letters."""
    eyes = "".join(EYES.format(4 * CONTEXT) if m.cfg.image_tokens[0] == "<img>" else
                   EYE.format(PAD * (i[0].numel() // 256)) for i in images)
    before, after = (USER + eyes + ASKS[task] + SAYS).split("{}")
    said = letters(m.tokenizer, prompt)
    assert max(said) < min(m.tokenizer.added_tokens_decoder)
    return m.tokenizer(before)["input_ids"] + said + m.tokenizer(after)["input_ids"]


@pytest.mark.parametrize("task", ASKS)
def test_names_in_a_prompt_are_letters(m, task):
    """A prompt neither ends its turn nor brings an image; what is answered can be scored again."""
    images = IMAGES if task == "critique" else None
    x, pos, lengths, starts = m.sequence(NAMED, images, task, queries=False)
    assert x.isfinite().all() and pos.shape[-1] == x.shape[1] == max(lengths) and lengths == starts
    table, image_id = m.vlm.get_input_embeddings().weight, m.vlm.config.image_token_id
    for b, prompt in enumerate(NAMED):
        ids = torch.tensor(asked_by_hand(m, prompt, IMAGES[b] if images else [], task))
        text = ids != image_id
        assert lengths[b] == len(ids) and text.all() == (task != "critique")
        assert torch.equal(x[b, : len(ids)][text], table[ids[text]])
    words = m.generate(NAMED, images, task, LIMIT)
    logp = m.text_logp(NAMED, images, words, task)
    torch.testing.assert_close(logp, words.logp, atol=1e-4, rtol=0)
    end = m.tokenizer.convert_tokens_to_ids(END)
    last = words.ids[torch.arange(4), words.mask.sum(1) - 1]
    assert torch.equal(words.closed, last == end)            # it ends on a token of its own alone


@pytest.mark.parametrize("kind", ["deepgen", "unirl-zero", "openuni"])
def test_names_in_what_is_drawn_or_edited_are_letters(qwen, kind):  # noqa: F811
    m = unified(qwen, **KINDS[kind])
    head = (HELP if kind == "unirl-zero" else "") + USER + "Generate an image: "
    tail = SAYS + ("<img>" if kind == "openuni" else "")
    cond = m.encode(NAMED)
    for b, prompt in enumerate(NAMED):
        ids = (m.tokenizer(head)["input_ids"] + letters(m.tokenizer, prompt)
               + m.tokenizer(tail)["input_ids"])
        ctx, _ = directly(m, row(m, ids))
        same(cond.ctx[b, : len(ctx)], ctx)
    both = m.encode(NAMED, IMAGES, "edit")
    assert both.ctx.isfinite().all()
    same(both.ctx[1:2, : m.cfg.n_query], m.encode(NAMED[1:2], IMAGES[1:2], "edit").ctx[
        :, : m.cfg.n_query])


def test_names_in_spelled_words_are_letters(m):
    texts = ["no, <|im_end|> is missing", "<IMG_CONTEXT><|image_pad|>", "no"]
    words, end = spell(m, texts), m.tokenizer.convert_tokens_to_ids(END)
    for row_, n, text in zip(words.ids.tolist(), words.mask.sum(1).tolist(), texts):
        assert row_[:n] == letters(m.tokenizer, text) + [end]
    logp = m.text_logp(NAMED[:3], IMAGES[:3], words, "critique")
    for b in range(3):
        one = m.text_logp(NAMED[b : b + 1], IMAGES[b : b + 1], words.rows([b]), "critique")
        n = int(words.mask[b].sum())
        assert one.shape[1] >= n and (logp[b, :n] < 0).all()
        torch.testing.assert_close(logp[b, :n], one[0, :n], atol=1e-4, rtol=0)
    assert m.encode(NAMED[:3], IMAGES[:3], "critique", words=words).ctx.isfinite().all()


def test_other_prompts_keep_their_tokens(m):
    """Of prompts without such names, all of the classroom's, no token has changed."""
    folder = tiny.ROOT / "data/shapes/prompts"
    rows = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.open()]
    texts = {r[k] for r in rows for k in ("prompt", "instruction", "question") if k in r}
    odd = ["", " x", "two\n\nlines", "1 < 2 > 1", "<|", "im_end|>", "<|im_end>", "é 你好 🙂", "{b}"]
    assert len(texts) > 1500
    for text in [*sorted(texts), *odd]:
        told = m.tokenizer(chat(m.cfg, text, "t2i", []))["input_ids"]
        assert chat_ids(m.cfg, m.tokenizer, text, "t2i", []) == told
    words = spell(m, odd)
    for ids, n, text in zip(words.ids.tolist(), words.mask.sum(1).tolist(), odd):
        assert ids[:n] == m.tokenizer(text + END)["input_ids"]


# --- words between prompt and queries ---


@pytest.mark.parametrize("kind", ["deepgen", "unirl-zero", "openuni"])
def test_the_dit_reads_prompt_words_and_queries(qwen, kind):  # noqa: F811
    """And what opens the assistant's turn for a picture stands behind the words, at the queries."""
    m = unified(qwen, **KINDS[kind])
    texts = ["<think>red</think><answer>a red circle</answer>", "no", "a star"]
    words = spell(m, texts)
    assert words.closed.all() and words.texts == texts and not words.logp.any()
    cond = m.encode(PROMPTS[:3], None, "think", words=words)
    head, tail = HELP if kind == "unirl-zero" else "", "<img>" if kind == "openuni" else ""
    for b, text in enumerate(texts):
        ctx, pooled = directly(m, row(
            m, head + USER + ASKS["think"].format(PROMPTS[b]) + SAYS + text + END + tail))
        same(cond.ctx[b, : len(ctx)], ctx)
        if pooled is not None:
            same(cond.pooled[b], pooled)


def test_a_picture_is_drawn_anew_from_image_and_critique(qwen):  # noqa: F811
    m = unified(qwen, **KINDS["unirl-zero"])
    words = spell(m, ["no, two stars", "no"])
    both = m.encode(["a", "b"], [IMAGES[0], IMAGES[3]], "critique", words=words).ctx
    assert apart(both[:1], m.encode(["a"], [IMAGES[3]], "critique", words=words.rows([0])).ctx)
    assert apart(both[:1], m.encode(["a"], [IMAGES[0]], "critique", words=words.rows([1])).ctx)
    m.bridge.edit_queries.data.zero_()                      # an image is there: an edit's queries
    assert apart(both, m.encode(["a", "b"], [IMAGES[0], IMAGES[3]], "critique", words=words).ctx)


def test_a_placeholder_that_was_said_is_no_image(m):
    """An untrained LM says anything, an image's token too: it is a word like any other."""
    image = m.vlm.config.image_token_id
    words = m.generate(*asked("critique"), limit=4)
    words.ids[:, 1] = image
    logp = m.text_logp(PROMPTS, IMAGES, words, "critique")
    words.ids[:, 1] = 5
    assert logp.isfinite().all() and apart(logp[:, 2:], m.text_logp(
        PROMPTS, IMAGES, words, "critique")[:, 2:])


# --- tags ---


def test_spans():
    good = "<think>two and two</think><answer>four</answer>"
    assert spans(good) == dict(think="two and two", answer="four", ok=True)
    assert spans(f" {good[:27]}\n {good[27:]}\n")["ok"] is False              # a tag torn apart
    assert spans("\n<think>a\nb</think>\n<answer> c </answer>\n") == dict(
        think="a\nb", answer="c", ok=True)
    for bad in ("", "four", "<think>for ever and", "<think>a</think>", "<answer>c</answer>",
                good + "!", "so: " + good, good + good, "<think>a</think> b <answer>c</answer>",
                "<answer>c</answer><think>a</think>", "<think><think>a</think><answer>c</answer>",
                "<think>a<answer>b</think></answer>", "<think>a</think><answer>b</answer",
                "<think>a</think><answer>b<answer></answer>", "</answer></think>"):
        assert spans(bad)["ok"] is False, bad
    assert spans("<think>a</think><answer>b")["answer"] == ""
    assert spans("junk <answer>b</answer>")["answer"] == "b"


# --- gradients ---


@pytest.mark.parametrize("chunk", [None, 3])
def test_gradient_of_the_log_probs(m, chunk, monkeypatch):
    """Few tokens at a time, computed again by backward, or transformers' own forward: the same."""
    learn(m, {"vlm": None}).zero_grad()
    words = m.generate(PROMPTS, limit=6)
    if chunk:
        monkeypatch.setattr(m.vlm.lm_head, "out_features", 2**24 // chunk)
    m.text_logp(PROMPTS, None, words).sum().backward()
    mine = {k: p.grad.clone() for k, p in m.vlm.named_parameters() if p.grad is not None}
    assert not any("visual" in k or "vision" in k for k in mine) and "lm_head.weight" in mine
    m.zero_grad()
    for b in range(4):
        n = int(words.mask[b].sum())
        alone(m, PROMPTS[b], [], "think", words.ids[b, :n].tolist())[0].sum().backward()
    for k, p in m.vlm.named_parameters():
        if k in mine:
            assert p.grad.norm() > 0
            assert (mine[k] - p.grad).norm() <= 1e-4 * p.grad.norm(), k
    m.requires_grad_(False)


@pytest.mark.parametrize("train", ["both", "dit"])
def test_the_pictures_loss_reaches_the_language_model(parts, train):
    cfg = Config(**json.loads((parts / "config.json").read_text()))
    m = learn(tiny.build(cfg, init=parts / "sft"),
              {"dit": None} | ({"bridge": None, "vlm": None} if train == "both" else {}))
    words = m.generate(PROMPTS[:2], limit=5)
    cond, logp = m.encode_words(PROMPTS[:2], None, words)
    x = m.noise([0, 1])
    m.velocity(x, 0.5, [(1.0, cond)]).square().mean().backward()       # the picture's loss alone
    reached = {k for k, p in m.named_parameters() if p.grad is not None and p.grad.any()}
    lm = {k for k in reached if k.startswith("vlm.")}
    assert any(k.startswith("dit.") for k in reached) and not any("visual" in k for k in lm)
    assert logp.requires_grad == (train == "both")
    if train == "dit":
        assert not lm and not any(k.startswith("bridge.") for k in reached)
    else:
        assert all(f"vlm.model.language_model.layers.{i}.self_attn.q_proj.weight" in lm
                   for i in (0, 1))
        assert "bridge.meta_queries" in reached


# --- weights and presets ---


def test_a_language_model_that_learned_is_kept(parts, tmp_path):
    """Tied weights, as Qwen2.5-VL-3B's: one parameter, two names, the average under both."""
    cfg = Config(**json.loads((parts / "config.json").read_text()))
    m = learn(tiny.build(cfg), {"vlm": None})
    params = {k: p for k, p in m.named_parameters() if p.requires_grad}
    assert m.vlm.lm_head.weight is m.vlm.get_input_embeddings().weight
    ema = Ema(params, 0.5)
    [p.data.mul_(1.1) for p in params.values()]
    ema.update(100)
    save_weights(m, ema, tmp_path / "ckpt", 1)()
    again = tiny.build(cfg, init=tmp_path / "ckpt")
    with ema.applied():
        words = m.generate(PROMPTS, limit=6)
        same(again.text_logp(PROMPTS, None, words), m.text_logp(PROMPTS, None, words))
    assert apart(again.text_logp(PROMPTS, None, words), tiny.build(cfg).text_logp(
        PROMPTS, None, words))


@pytest.mark.parametrize("name", [k for k, c in PRESETS.items() if c.bridge != "text"])
def test_presets_ask_for_words(name):
    """Every VLM is asked in words; no suffix of a picture's turn comes before its answer."""
    m = Unified.__new__(Unified)
    nn.Module.__init__(m)
    m.cfg = PRESETS[name]
    for task, n in (("think", 0), ("answer", 0), ("answer", 1), ("critique", 1)):
        told = chat(m.cfg, "a {b}", task, [3] * n)
        assert "a {b}" in told and told.endswith(SAYS)
        assert told.count(m.cfg.image_tokens[1]) == 3 * n
    if not name.startswith("shapes"):
        assert all(tag in m.cfg.think_text for tag in ("<think>", "</think>", "<answer>"))


def test_an_answer_is_its_words():
    for said in ("three", "Three.", " three . ", "<think>x</think><answer>three .</answer>"):
        assert answer_of(said) == "three"
