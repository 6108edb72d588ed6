"""The classroom world: its gates, and what every later figure rests on."""

import io
import json
import math
import random
import re
import tarfile
from collections import Counter

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

import data.shapes.prepare as prepare_py
import data.shapes.talk as talk_py
import data.shapes.captions as captions_py
import data.shapes.world as world_py
from common.checkpoint import read_about
from common.presets import PRESETS
from data.shapes.bench import bench_shapes
from data.shapes.judge import check, detect_shapes
from data.shapes.prepare import (ASSISTANT, HERE, TASKS, USER, canonical, make_edits, make_prompts,
                                 make_questions, make_reflections, to_tensor, tokenizer, vlm_task)
from data.shapes.captions import CAPTION_ERROR, holds, phrase, sample_meta, scene_for, training_pair
from data.shapes.edits import KINDS, held, sample_edit, training_edit
from data.shapes.talk import IMAGE
from data.shapes.world import (COLORS, GROUND, SHAPES, TAGS, UNSEEN_COUNT, UNSEEN_PAIRS, box,
                               relation, render)
from model import Unified


def truth(scene):
    return Counter((t["shape"], t["color"]) for t in scene)


def seen(image):
    return Counter((d["class"], d["color"]) for d in detect_shapes(image) if d["score"] > 0.5)


def shapes_scene(rng):
    return scene_for(sample_meta(rng.choice([*TAGS, "scene"]), rng), rng)


# ---------------------------------------------------------------------------------------------
# Scenes, captions, detector


def test_detector_reads_scenes():
    rng = random.Random(0)
    scenes = [shapes_scene(rng) for _ in range(5000)]
    assert sum(seen(render(s)) == truth(s) for s in scenes) >= 0.995 * len(scenes)


def test_detector_sees_nothing_in_nothing():
    noise = np.random.default_rng(0)
    blanks = [np.full((64, 64, 3), c, np.uint8) for c in (GROUND, (0, 0, 0), (250, 20, 20))]
    noises = [noise.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(50)]
    assert not any(seen(image) for image in blanks + noises)


def test_scenes_show_their_prompt():
    rng = random.Random(1)
    for _ in range(300):
        meta = sample_meta(rng.choice([*TAGS, "text", "scene", "reason"]), rng)
        scene = scene_for(meta, rng)
        assert holds(meta, scene) and check(render(scene), meta)["correct"]
        for i, a in enumerate(map(box, scene)):
            assert min(a) >= 0 and max(a) <= 64
            assert all(a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
                       for b in map(box, scene[:i]))  # fmt: skip
        if meta["tag"] != "reason":
            assert meta["prompt"] == f"a photo of {phrase(meta)}"


def test_captions_err_at_the_stated_rate():
    rng, n = random.Random(2), 4000
    wrong = sum(not check(render(scene), meta)["strict"]
                for meta, scene in (training_pair(rng) for _ in range(n)))  # fmt: skip
    assert abs(wrong / n - CAPTION_ERROR) < 2 * math.sqrt(CAPTION_ERROR * (1 - CAPTION_ERROR) / n)


def test_what_is_held_out_is_never_trained():
    rng = random.Random(3)
    for _ in range(20000):
        meta, scene = training_pair(rng)
        asked = [(g["class"], g.get("color"), g["count"]) for g in meta["include"]]
        assert not any((c, s) in UNSEEN_PAIRS or (s, n) == UNSEEN_COUNT for s, c, n in asked)
        things = [t for t in scene if "shape" in t]
        assert not any((t["color"], t["shape"]) in UNSEEN_PAIRS for t in things)
        shape, n = UNSEEN_COUNT
        assert sum(t["shape"] == shape for t in things) < n


# ---------------------------------------------------------------------------------------------
# Files


def unpacked(shard, *endings):
    """The records of a shard, each with files of these endings: pictures as arrays, or JSON"""
    with tarfile.open(shard) as tar:
        found = {}
        for member in tar:
            key, _, ending = member.name.partition(".")
            found.setdefault(key, {})[ending] = tar.extractfile(member).read()
    for files in found.values():
        yield [json.loads(files[e]) if e == "json" else np.array(Image.open(io.BytesIO(files[e])))
               for e in endings]


def test_same_seed_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_py, "PER_SHARD", 40)
    for name, seed in (("a", "x"), ("b", "x"), ("c", "y")):
        prepare_py.write_shard(tmp_path / f"{name}.tar", seed)
    a, b, c = ((tmp_path / f"{n}.tar").read_bytes() for n in "abc")
    assert a == b != c
    rows = list(unpacked(tmp_path / "a.tar", "png", "json"))
    rng = random.Random("x")
    assert len(rows) == 40
    for image, text in rows:
        meta, scene = training_pair(rng)
        assert (image == render(scene)).all() and text["prompt"] == meta["prompt"]


def test_twins_are_one_prompt():
    rng = random.Random(4)
    swap = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for _ in range(100):
        meta = sample_meta(rng.choice(["position", "two_object", "color_attr"]), rng)
        twin = json.loads(json.dumps(meta))
        twin["include"].reverse()
        if meta["tag"] == "position":
            rel, _ = twin["include"][0].pop("position")
            other = json.loads(json.dumps(twin))
            other["include"][1]["position"] = [rel, 0]  # "b left of a" is another prompt
            assert canonical(other) != canonical(meta)
            twin["include"][1]["position"] = [swap[rel], 0]
        assert canonical(twin) == canonical(meta)
        assert phrase(twin) != phrase(meta)


def test_prompt_files():
    prompts = make_prompts()
    made = prompts | make_edits() | make_questions() | make_reflections(prompts)
    large = {name: made.pop(name) for name in ("vqa_train", "reflect_train")}    # not committed
    files = {p.stem: [json.loads(line) for line in p.open()]
             for p in (HERE / "prompts").glob("*.jsonl") if p.stem not in large}  # fmt: skip
    assert files == json.loads(json.dumps(made)) and [*map(len, large.values())] == [600, 400]
    files = {k: rows for k, rows in files.items() if k in prompts}
    assert Counter(m["tag"] for m in files["eval"]) == {tag: 60 for tag in TAGS}
    count = Counter(m["tag"] for m in files["train"])
    assert [count[t] for t in TAGS] == [0, 100, 500, 100, 700, 300]
    for test, trained in (("eval", "train"), ("text", "text_train"), ("reason", "reason_train")):
        known = {(m["tag"], canonical(m)) for m in files[trained]}
        assert not any((m["tag"], canonical(m)) in known for m in files[test])
    pairs = [(m["tag"], (g.get("color"), g["class"]) in UNSEEN_PAIRS,
              (g["class"], g["count"]) == UNSEEN_COUNT)
             for m in files["unseen"] for g in m["include"]]  # fmt: skip
    assert all(new_count if tag == "counting" else new_pair for tag, new_pair, new_count in pairs)
    assert all((g.get("color"), g["class"]) not in UNSEEN_PAIRS
               and (g["class"], g["count"]) != UNSEEN_COUNT
               for k in files if k != "unseen" for m in files[k] for g in m["include"])


# ---------------------------------------------------------------------------------------------
# Edits

THING = rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
THE = THING.replace("an?", "the")


def obey(instruction, things, where):
    """What a reader of the instruction would expect: {shape: colour}, relation -> the same."""
    things = dict(things)
    if m := re.fullmatch(f"add {THING}", instruction):
        things[m[2]] = m[1]
    elif m := re.fullmatch(f"remove {THE}", instruction):
        assert things.pop(m[2]) == m[1]
    elif m := re.fullmatch(r"change the color of the (\w+) to (\w+)", instruction):
        assert things[m[1]] != m[2]
        things[m[1]] = m[2]
    elif m := re.fullmatch(f"replace {THE} with {THING}", instruction):
        assert things.pop(m[2]) == m[1]
        things[m[4]] = m[3]
    else:
        m = re.fullmatch(r"move the (\w+) (?:to the )?(left of|right of|above|below) the (\w+)",
                         instruction)  # fmt: skip
        assert set(things) == {m[1], m[3]}
        where = (m[1], m[2], m[3])
    return things, where


def facts(scene, kind):
    where = None
    if kind == "move":
        (rel,) = relation(box(scene[1]), box(scene[0]))
        where = scene[1]["shape"], rel, scene[0]["shape"]
    return {t["shape"]: t["color"] for t in scene}, where


@pytest.mark.parametrize("kind", KINDS)
def test_edits(kind):
    rng = random.Random(5)
    for _ in range(200):
        e = sample_edit(rng, kind)
        source, target = facts(e["source"], kind), facts(e["target"], kind)
        assert obey(e["instruction"], *source) == target
        assert obey(e["inverse"], *target) == source
        assert holds(e["source_meta"], e["source"]) and holds(e["target_meta"], e["target"])
        assert not holds(e["target_meta"], e["source"]) or kind == "remove"
        kept = [t for t in e["source"] if t in e["target"]]
        assert len(kept) == len(e["source"]) - (kind != "add")  # exactly one thing changed
        assert not UNSEEN_PAIRS & {(c, s) for s, c in target[0].items()}
        assert seen(render(e["target"])) == truth(e["target"])


def test_edits_that_are_tested_are_never_trained():
    train, test = (make_edits()[name] for name in ("edit_train", "edit_eval"))
    for rows, n in ((train, 40), (test, 60)):
        assert Counter(e["kind"] for e in rows) == dict.fromkeys(KINDS, n)
        assert all(e not in rows[:i] for i, e in enumerate(rows))
    assert all(held(e["source"]) for e in test) and not any(held(e["source"]) for e in train)
    assert not any("target" in e for e in train)
    for e in test:                        # in whatever order a scene's things stand
        assert held(e["source"][::-1]) and holds(e["target_meta"], e["target"])
    rng = random.Random(6)
    for _ in range(2000):
        e = training_edit(rng)
        assert not held(e["source"]) and not held(e["target"])


def test_edits_err_at_the_stated_rate():
    """A target of another edit fails the caption, or has a thing more or less."""
    rng, n, wrong = random.Random(7), 4000, 0
    for _ in range(n):
        e = training_edit(rng)
        wrong += not holds(e["target_meta"], e["target"]) or (
            len(e["target"]) != len(e["target_meta"]["include"]))
    assert abs(wrong / n - CAPTION_ERROR) < 3 * math.sqrt(CAPTION_ERROR * (1 - CAPTION_ERROR) / n)


def test_edit_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_py, "PER_SHARD", 20)
    prepare_py.write_shard(tmp_path / "a.tar", "x", prepare_py.edit_example)
    rows = list(unpacked(tmp_path / "a.tar", "source.png", "target.png", "json"))
    rng = random.Random("x")
    assert len(rows) == 20
    for source, target, text in rows:
        e = training_edit(rng)
        assert (source == render(e["source"])).all() and (target == render(e["target"])).all()
        assert text == {k: e[k] for k in ("instruction", "inverse")}


# ---------------------------------------------------------------------------------------------
# Questions, and what cold starts learn from


def counted(image):
    return Counter(d["class"] for d in detect_shapes(image) if d["score"] > 0.5)


def reread(row):
    """The answer of a question about a picture, from what the detector finds in it."""
    image, ask = render(row["scene"]), row["question"]
    if ask == "Describe the image.":
        found = sorted(detect_shapes(image), key=lambda d: d["box"][0] + d["box"][2])
        names = [captions_py.article(f"{d['color']} {d['class']}") for d in found]
        return "a photo of " + (" and " if len(names) == 2 else ", ").join(names)
    if m := re.fullmatch(r"How many (\w+) are there\?", ask):
        (shape,) = [s for s in SHAPES if captions_py.plural(2, s).split()[1] == m[1]]
        return world_py.NUMBERS[counted(image)[shape]]
    if m := re.fullmatch(rf"Is there an? ({'|'.join(SHAPES)})\?", ask):
        return "yes" if counted(image)[m[1]] else "no"
    if m := re.fullmatch(rf"Is there {THING}\?", ask):
        return "yes" if seen(image)[m[2], m[1]] else "no"
    m = re.fullmatch(r"Does the image show an? (\w+) ([\w ]+) an? (\w+)\?", ask)
    where = {d["class"]: d["box"] for d in detect_shapes(image)}
    return "yes" if m[2] in relation(where[m[1]], where[m[3]]) else "no"


def test_questions_have_their_answers():
    files = make_questions()
    assert np.mean([reread(r) == r["answer"] for r in files["vqa_train"] + files["vqa"]]) > 0.995
    mixes = {frozenset(v): k for k, v in world_py.MIXES.items()}
    for row in files["textqa_train"] + files["textqa"]:
        ask = row["question"].removeprefix(talk_py.THINK.format("a photo of "))
        if m := re.fullmatch(r"an? (\w+) in the color of (\w+) (?:mixed with|and) (\w+)", ask):
            right = captions_py.article(f"{mixes[frozenset(m.groups()[1:])]} {m[1]}")
        elif m := re.fullmatch(r"as many (\w+) as an? (triangle|square) has sides", ask):
            right = f"{dict(triangle='three', square='four')[m[2]]} {m[1]}"
        else:
            m = re.fullmatch(r"as many (\w+) as (\w+) and (\w+)", ask)
            right = f"{world_py.NUMBERS[sum(map(world_py.NUMBERS.index, m.groups()[1:]))]} {m[1]}"
        assert row["answer"] == f"a photo of {right}"


def test_questions_that_are_tested_are_never_trained():
    files = make_questions()
    assert not any(held(r["scene"]) for r in files["vqa_train"])
    assert all(held(r["scene"]) for r in files["vqa"])
    assert Counter(r["tag"] for r in files["vqa"]) == dict.fromkeys(talk_py.PICTURE_KINDS, 60)
    train, test = ({r["answer"] for r in files[k]} for k in ("textqa_train", "textqa"))
    assert not train & test and min(len(train), len(test)) > 15
    yes = [r["answer"] for r in files["vqa"] if r["answer"] in ("yes", "no")]
    assert abs(yes.count("yes") / len(yes) - 0.5) < 0.12
    more = make_questions(150)                           # only what is trained grows
    assert more["vqa_train"][:600] == files["vqa_train"]
    assert Counter(r["tag"] for r in more.pop("vqa_train")) == dict.fromkeys(
        talk_py.PICTURE_KINDS, 150)
    assert more == {k: v for k, v in files.items() if k != "vqa_train"}


def test_first_pictures_are_right_and_wrong():
    prompts = make_prompts()
    files = make_reflections(prompts)
    assert len(files["reflect"]) == 180 and len(files["reflect_train"]) == 400
    for name, rows in files.items():
        for row in rows:
            assert check(render(row["right"]), row)["correct"]
            assert not check(render(row["wrong"]), row)["correct"]
            assert {held(row["right"]), held(row["wrong"])} == {name != "reflect_train"}
    more = make_reflections(prompts, 100)
    assert more["reflect"] == files["reflect"] and len(more["reflect_train"]) == 500
    known = {canonical(m) for m in more["reflect_train"]}
    assert not any(canonical(m) in known for m in files["reflect"])


def test_cold_starts_are_drawn_as_told(monkeypatch):
    """A thought's picture shows its answer, right or wrong; a critique is true of the first
    picture, and the refined one is what the prompt asks."""
    rng, thought, real = random.Random(11), [], prepare_py.think

    def think(meta, rng):
        text, told = real(meta, rng)
        thought.append((meta, told))
        return text, told
    monkeypatch.setattr(prepare_py, "think", think)
    rows = [prepare_py.cot_example(rng) for _ in range(1500)]
    for row, (meta, told) in zip(rows, thought):
        shown = check(render(row["png"]), dict(told, exclude=[]))  # which is still the prompt's
        assert shown["strict"] and row["json"]["prompt"] == meta["prompt"]
        assert re.fullmatch(f"<think>[^<]+</think><answer>a photo of {re.escape(phrase(told))}"
                            "</answer>", row["json"]["reasoning"])
    wrong = [phrase(told) != phrase(meta) for meta, told in thought if meta["tag"] == "reason"]
    assert len(wrong) > 300 and abs(np.mean(wrong) - talk_py.THINK_ERROR) < 0.08
    asked, picture = [], prepare_py.split_picture

    def spy(meta, *more):
        asked.append(meta)
        return picture(meta, *more)
    monkeypatch.setattr(prepare_py, "split_picture", spy)
    right, n = 0, 1500
    for _ in range(n):
        asked.clear()
        row = prepare_py.reflect_example(rng)
        first, refined = row["image.png"], row["refined.png"]
        yes = row["json"]["critique"] == "yes"
        assert check(render(first), asked[0])["correct"] == yes == (first == refined)
        assert check(render(refined), asked[0])["correct"] and not held(first)
        assert yes or row["json"]["critique"] == f"no, the image shows {talk_py.caption(first)}"
        right += yes
    assert abs(right / n - prepare_py.RIGHT_SHARE) < 0.05        # 4.5 standard errors


# ---------------------------------------------------------------------------------------------
# Parts


def test_tokenizer():
    tok = tokenizer("<|im_end|>")
    for word in prepare_py.WORDS:
        assert len(tok(" " + word).input_ids) == 1, word
    assert tok.tokenize('a sign "AC47"')[3:] == ["A", "C", "4", "7", '"']
    text = "Ein Foto: 日本, naïve café №7 🙂\n\ttabs"
    assert tok.decode(tok(text).input_ids) == text


def test_vae_keeps_what_matters():
    vae = AutoencoderKL.from_pretrained(HERE / "vae").eval()
    rng = random.Random(6)
    scenes = [shapes_scene(rng) for _ in range(400)]
    right = 0
    for i in range(0, len(scenes), 50):
        part = scenes[i : i + 50]
        with torch.no_grad():
            y = vae.decode(vae.encode(to_tensor([render(s) for s in part])).latent_dist.mode())
        y = ((y.sample.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        right += sum(seen(image) == truth(s) for image, s in zip(y, part))
    assert right >= 0.98 * len(scenes)


def test_clip_picks_the_right_edit():
    path = f"local-dir:{HERE / 'clip'}"
    clip, _, prepare = open_clip.create_model_and_transforms(path)
    tok = open_clip.get_tokenizer(path)
    assert tok("a photo of " + "a red circle, " * 30)[0, -1] == tok.tokenizer.eos_token_id
    rng, edits = random.Random(7), []
    # Two edits of one scene that end differently. No moves: like its big sisters, this
    # CLIP hardly tells left from right (0.55 of them are picked rightly).
    while len(edits) < 300:
        e = sample_edit(rng, rng.choice(["add", "remove", "recolor", "replace"]))
        other = sample_edit(rng, source=e["source"])
        if other["target"] != e["target"] and not holds(e["target_meta"], other["target"]):
            edits.append((e, other))
    x = [to_tensor([render(pair[i][k]) for pair in edits])
         for i, k in ((0, "source"), (0, "target"), (1, "target"))]  # fmt: skip
    first = prepare(Image.fromarray(render(edits[0][0]["source"])))
    assert torch.allclose(first, x[0][0], atol=1e-5)  # its preprocessing is the world's own
    with torch.no_grad():
        source, right, wrong = (F.normalize(clip.encode_image(i), dim=1) for i in x)
        before, after = (F.normalize(clip.encode_text(tok([e[k]["prompt"] for e, _ in edits])),
                                     dim=1) for k in ("source_meta", "target_meta"))  # fmt: skip
    text = after - before
    better = F.cosine_similarity(right - source, text) > F.cosine_similarity(wrong - source, text)
    assert better.float().mean() >= 0.90


@pytest.fixture(scope="module")
def vlm():
    model = AutoModelForImageTextToText.from_pretrained(HERE / "vlm").eval()
    return model, AutoProcessor.from_pretrained(HERE / "vlm")


def replies(vlm, task, n, words):
    """n fresh questions of a kind -> [(greedy reply, expected)]."""
    model, processor = vlm
    tok, rng = processor.tokenizer, random.Random(8)
    tasks = [vlm_task(rng, task) for _ in range(n)]
    ids = tok([text for text, _, _ in tasks], padding=True, padding_side="left",
              return_tensors="pt")  # fmt: skip
    images = [render(s) for _, _, scenes in tasks for s in scenes]
    seen = processor.image_processor(images=images, return_tensors="pt") if images else {}
    kinds = (ids.input_ids == model.config.image_token_id).int()
    out = model.generate(**ids, **seen, mm_token_type_ids=kinds, max_new_tokens=words,
                         do_sample=False)  # fmt: skip
    said = tok.batch_decode(out[:, ids.input_ids.shape[1] :], skip_special_tokens=True)
    return [(a, b.removesuffix("<|im_end|>")) for a, (_, b, _) in zip(said, tasks)]


def test_vlm_answers_yes_and_no_imperfectly(vlm):
    pairs = replies(vlm, "yes_no", 600, 2)
    right = [np.mean([a == b for a, b in pairs if b == word]) for word in ("yes", "no")]
    assert 0.65 <= np.mean(right) <= 0.85


def test_vlm_captions_parse(vlm):
    thing = rf"an? (?:(?:{'|'.join(COLORS)}) )?(?:{'|'.join(SHAPES)})"
    counts = "|".join(captions_py.plural(n, s) for n in (1, 2, 3, 4) for s in SHAPES)
    links = ", | and | left of | right of | above | below "
    caption = rf'a photo of (?:{counts}|a sign "[A-Z0-9]{{1,4}}"|{thing}(?:(?:{links}){thing})*)'
    assert np.mean([bool(re.fullmatch(caption, a)) for a, _ in replies(vlm, "caption", 200, 24)]
                   ) >= 0.90  # fmt: skip


def test_vlm_follows_the_thinking_format(vlm):
    form = "<think>[^<]+</think><answer>a photo of [^<]+</answer>"
    assert np.mean([bool(re.fullmatch(form, a)) for a, _ in replies(vlm, "think", 100, 64)]) >= 0.60


def test_vlm_is_an_ordinary_qwen(vlm):
    model, processor = vlm
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    image = render(shapes_scene(random.Random(9)))
    talk = [dict(role="user", content=[dict(type="image"), dict(type="text", text="Say it.")])]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    batch = processor(text=[text], images=[Image.fromarray(image)], return_tensors="pt")
    ours = processor.tokenizer(USER + IMAGE + "Say it." + ASSISTANT).input_ids
    assert batch.input_ids[0].tolist() == ours
    photo = AutoImageProcessor.from_pretrained(HERE / "vlm")(
        images=Image.new("RGB", (640, 480)), return_tensors="pt")  # fmt: skip
    assert photo.image_grid_thw.prod() <= 64  # any photo becomes about 64x64 pixels
    with torch.no_grad():
        before = model(**batch).logits
        lora = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
        assert torch.allclose(lora(**batch).logits, before, atol=1e-5)
    assert 0 < sum(p.numel() for p in lora.parameters() if p.requires_grad) < 1e5
    lora.unload()


def test_every_question_has_its_answer():
    rng = random.Random(10)
    for task in TASKS:
        for _ in range(50):
            text, answer, scenes = vlm_task(rng, task)
            assert text.startswith(USER) and answer.endswith("<|im_end|>")
            assert text.count(IMAGE) == len(scenes)
            assert text.endswith(ASSISTANT) or task == "text"


def test_weights_name_their_world():
    for folder in ("sft", "sft-edit"):
        assert read_about(f"data/shapes/{folder}")["world"] == world_py.VERSION
    assert PRESETS["shapes"].world == world_py.VERSION


@pytest.mark.parametrize("folder, least", [("sft", 0.44), ("sana/sft", 0.26)])
def test_what_ships_draws(folder, least):
    """The checkpoints of stage 2, from which RL starts: 96 images, standard error 0.05."""
    model = Unified.load(f"data/shapes/{folder}")
    r = bench_shapes(model.draw, 1, 96)
    assert r["score"] > least and r["extra_rate"] < 0.4
    assert bench_shapes(lambda p, s: model.draw(p, s, guidance=3.0), 1, 96)["score"] > r["score"]
