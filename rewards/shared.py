"""What rewards share: where their models are, and what edits must bring along."""

from pathlib import Path

from huggingface_hub import hf_hub_download

from common.read import arrays
from common.run import fail, first_line, local_device
from data.shapes.world import SIDE

CLASSROOM = Path(__file__).parent.parent / "data/shapes"
MODELS = {  # a folder, or owner/repo on the Hub; edit to judge by another version
    "clip": "openai/clip-vit-large-patch14",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "pickscore-processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",   # PickScore ships none
    "aesthetic": "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",   # on the features of clip
    "hpsv2": "xswu/HPSv2/HPS_v2_compressed.pt",   # HPS_v2.1_compressed.pt: another scale
    "hpsv2-arch": "ViT-H-14",
    "ocr-det": "PaddlePaddle/PP-OCRv5_mobile_det_safetensors",
    "ocr-rec": "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors",
    "judge": "Qwen/Qwen2.5-VL-7B-Instruct",
    "edit_model": "out/reward/ckpt",   # what labs/edit_reward.py leaves; no public one is known
    "clip-shapes": str(CLASSROOM / "clip"),
    "judge-shapes": str(CLASSROOM / "vlm"),
}


def classroom(images):
    """Are these (N,3,H,W) pictures of the classroom world? By size: nobody else draws 64x64."""
    return tuple(images.shape[-2:]) == (SIDE, SIDE)


def to_device(model):
    return model.eval().requires_grad_(False).to(local_device())


def hub_file(name):
    """A local file, or owner/repo/file on the Hub -> its path."""
    if Path(name).is_file():
        return name
    owner, repo, file = name.split("/", 2)
    try:
        return hf_hub_download(f"{owner}/{repo}", file)
    except (OSError, ValueError) as e:
        fail(f"{name} is neither a file nor on the Hub: {first_line(e)}")


def processor(kind, name):
    """A transformers tokenizer, image processor or both, from a folder or the Hub."""
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as e:
        fail(f"{name} has no {kind.__name__}: {first_line(e)}")


# What a reward of edits reads of a row, beside its "source_image", a uint8 (3,H,W) tensor;
# the checker needs a scene as source, not a file.
EDIT_NEEDS = dict(edit=("kind", "source", "target_meta"), clip_direction=("captions",),
                  clip_image=(), edit_judge=("instruction",), edit_model=("instruction",))


def lacks(reward, row):
    """The first field that a reward of edits needs and a row has not, or None."""
    return next((k for k in EDIT_NEEDS.get(reward, ()) if not row.get(k)
                 or k == "source" and isinstance(row[k], str)), None)


def must_score(rewards, rows):
    """ValueError where one of these rewards can never score one of these rows of edits."""
    for i, row in enumerate(rows, 1):
        for name in rewards:
            if field := lacks(name, row):
                field = dict(captions="source_prompt` and `target_prompt").get(field, field)
                raise ValueError(f"{row.get('where', f'edit {i}')}: reward {name!r} needs "
                                 f"`{field}`" + ", a scene" * (field == "source"))


def able(reward, rows):
    """Indices of the rows that a reward of edits can score."""
    return [i for i, m in enumerate(rows)
            if m.get("source_image") is not None and not lacks(reward, m)]


def sources(rows, which):
    """-> what was edited, a list of uint8 (H,W,3): sources need not be of one size"""
    return [arrays(rows[i]["source_image"][None])[0] for i in which]
