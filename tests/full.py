"""The papers' models at their true size, and small ones like them, with random weights: each part's
configuration as its release has it, so that nothing is downloaded. Used by tests/gpu.py.

Their tokenizer is the classroom's, whose ids all of them have.
"""

import json
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    InternVLConfig,
    Qwen2_5_VLConfig,
    T5Config,
)

from common.presets import PRESETS

ROOT = Path(__file__).parent.parent
TOKENS = str(ROOT / "data/shapes/vlm")
TINY = dict(vlm_dim=32, n_query=3, c_dim=32, c_ff=64, c_layers=1, c_heads=4, t5_tokens=9, size=64)
SANA = dict(sample_size=2, num_layers=2, num_attention_heads=4, attention_head_dim=8,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
            caption_channels=32)


def qwen(small, width, ff, layers, heads, vocab, tied):
    eye = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
               window_size=112, fullatt_block_indexes=[7, 15, 23, 31], out_hidden_size=width)
    section = [16, 24, 24]                                       # of a head's 128 numbers
    if small:
        width, ff, layers, heads, vocab, section = 32, 64, 2, (4, 2), 640, [1, 1, 2]
        eye |= dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=32,
                    fullatt_block_indexes=[0])
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=section)
    text = dict(vocab_size=vocab, hidden_size=width, intermediate_size=ff, num_hidden_layers=layers,
                num_attention_heads=heads[0], num_key_value_heads=heads[1], rope_parameters=rope,
                max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
                tie_word_embeddings=tied)
    return Qwen2_5_VLConfig(text_config=text, vision_config=eye, tie_word_embeddings=tied,
                            dtype="bfloat16")


def intern(small):
    text = dict(model_type="qwen2", vocab_size=151674, hidden_size=1536, intermediate_size=8960,
                num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                tie_word_embeddings=False)
    eye = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
               num_attention_heads=16, image_size=[448, 448], patch_size=[14, 14])
    if small:
        text |= dict(vocab_size=640, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=4)
        eye |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=4)
    return InternVLConfig(text_config=text, vision_config=eye, tie_word_embeddings=False,
                          dtype="bfloat16")


def clip(small, width, layers, heads):
    if small:
        width, layers, heads = width // 64, 2, 4
    return CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                          num_attention_heads=heads, projection_dim=width, vocab_size=49408)


def t5(small):
    size = dict(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8) if small else dict(
        d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64)
    return T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **size)


def sd3_vae(small):
    wide = (8, 8, 8, 8) if small else (128, 256, 512, 512)
    return AutoencoderKL(
        block_out_channels=wide, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=16, layers_per_block=2,
        norm_num_groups=4 if small else 32, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.5305, shift_factor=0.0609, sample_size=1024)


def dc_ae(small):
    wide = (8, 8, 8, 16, 32, 32) if small else (128, 256, 512, 512, 1024, 1024)
    blocks, far = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, ((),) * 3 + ((5,),) * 3
    return AutoencoderDC(
        latent_channels=32, attention_head_dim=8 if small else 32, encoder_block_types=blocks,
        decoder_block_types=blocks, encoder_block_out_channels=wide,
        decoder_block_out_channels=wide, encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(3, 3, 3, 3, 3, 3), encoder_qkv_multiscales=far,
        decoder_qkv_multiscales=far, downsample_block_type="Conv",
        upsample_block_type="interpolate", scaling_factor=0.41407)


def save(config, folder):
    """A part's config.json -> its folder, as text"""
    if not isinstance(config, torch.nn.Module):
        config.save_pretrained(folder)
    else:                                                        # diffusers'
        config.save_config(folder)
    return str(folder)


def presets(folder, small=False):
    """Every paper's preset with parts that lie in `folder`, as config.json alone. -> {name: Config}

    small: the same parts with few layers and little width; a picture of 64 pixels."""
    with torch.device("meta"):
        kl, dc = save(sd3_vae(small), folder / "kl"), save(dc_ae(small), folder / "dc")
    vlms = dict(
        qwen_3b=qwen(small, 2048, 11008, 36, (16, 2), 151936, True),
        qwen_7b=qwen(small, 3584, 18944, 28, (28, 4), 152064, False), intern=intern(small))
    vlms = {name: save(config, folder / name) for name, config in vlms.items()}
    for name, config in (("", clip(small, 768, 12, 12)), ("_2", clip(small, 1280, 32, 20)),
                         ("_3", t5(small))):
        save(config, folder / f"sd3/text_encoder{name}")
    found = {}
    for name, full in PRESETS.items():
        if name.startswith("shapes"):
            continue
        kind = ("intern" if full.image_tokens[0] == "<img>" else
                "qwen_7b" if full.vlm_dim == 3584 else "qwen_3b")
        own = dict(vlm=vlms[kind], vae=kl if full.mmdit else dc, text_encoder=str(folder / "sd3"))
        if small:
            own |= TINY | dict(layers=(2, 1) if full.layers else ())
            pooled = (768 + 1280) // 64
            mmdit = tiny.MMDIT | dict(in_channels=16, out_channels=16, num_layers=1,
                                      pooled_projection_dim=pooled)
            own |= dict(mmdit=mmdit) if full.mmdit else dict(sana=full.sana | SANA)
        found[name] = replace(full, **own)
    return found


@torch.no_grad()
def fill(part, device):
    """A module on the meta device gets memory on `device`, and random numbers of a size that no
    layer makes larger. -> part"""
    part.to_empty(device=device)
    for t in [*part.parameters(), *part.buffers()]:
        if not t.is_floating_point():
            t.copy_(torch.arange(t.numel(), device=device).view_as(t))       # places in a text
        elif t.ndim > 1:
            t.normal_(0, t[0].numel() ** -0.5)
        else:
            t.normal_(0, 0.2)
    return part


def random_weights(real, device):
    """A stand-in for Unified.from_preset, real: models have random weights on `device`, but for the
    classroom's."""
    def from_preset(name="shapes", init=None, meta=False, seed=0, **changes):
        if meta or name.startswith("shapes"):
            return real(name, init, meta, seed, **changes)
        model = real(name, None, meta=True, **changes)
        torch.manual_seed(seed)
        fill(model, device)
        words = AutoTokenizer.from_pretrained(TOKENS)
        if model.vlm:
            model.vlm.tie_weights()
            model.tokenizer = words
        else:
            words.model_max_length = 77
            model.text_encoder.tokenizers = [words] * 3
        return model
    return from_preset


def prompts(file, n):
    """Writes n prompts of 2 to 30 words. -> file"""
    words = "a red circle left of two blue squares above one small green star on white ".split()
    rows = [dict(prompt=" ".join(words[(i + k) % len(words)] for k in range(2 + 7 * i % 29)))
            for i in range(n)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
