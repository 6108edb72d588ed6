"""Presets and recipes: every paper's settings. Dimensions stand here, so that a preset can be built
without any download.
"""

import json
from dataclasses import dataclass, field

from common.run import fail

GRIDS, SOLVERS = ("uniform", "diffusers"), ("euler", "dpm")
KERNELS = ("flow", "unirl", "dance", "cps", "cps-simple")     # see model.sde_step


@dataclass
class Config:
    preset: str = "shapes"
    # parts in their ecosystems' formats: folders, or owner/repo[/subfolder] on the Hub
    vlm: str = ""                     # transformers: Qwen2.5-VL or InternVL3 (-hf)
    dit: str = ""                     # diffusers transformer
    vae: str = ""                     # diffusers AutoencoderKL or AutoencoderDC
    text_encoder: str = ""            # bridge `text`: open_clip folder, or an SD3 pipeline
    # bridge: from VLM hidden states to DiT context
    bridge: str = "scb"               # last | scb | lim | text
    layers: tuple = ()                # scb, lim: indices into hidden_states (0 = embeddings)
    keep: str = "all"                 # tokens the DiT sees: all (images, text, queries) | query
    n_query: int = 8                  # learnable "think" tokens at the end of the VLM's sequence
    edit_queries: bool = False        # edits have queries of their own
    vlm_dim: int = 128
    c_style: str = "ln"               # connector: ln (SigLIP's block) | rms (UniRL-Zero's)
    c_dim: int = 128                  # its width, feed-forward width, layers, heads
    c_ff: int = 512
    c_layers: int = 2
    c_heads: int = 4
    text: str = "clip"                # bridge text: clip (open_clip) | sd3 | sd3-no-t5 (zeros)
    t5_tokens: int = 256
    # what the VLM is told; {} is the prompt, {images} the references
    system: str = ""
    t2i_text: str = "Generate an image: {}"
    edit_text: str = "{images}\n{}"
    think_text: str = "Think, then generate an image: {}"    # to answer in words: see Words
    answer_text: str = "{images}{}"
    critique_text: str = "{images}Does the image match the prompt: {}?"
    suffix: str = ""                  # opens the assistant's turn, or the queries after its words
    image_tokens: tuple = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    refs: str = "both"                # who is shown an edit's images: vlm | dit | both | none
    ref_noise: float = 0.0            # share of noise in the latents that the DiT is shown
    vit_scale: float = 0.0            # a reference's size for the VLM, 1 = as it is; 0: a fixed one
    pos: str = "mrope"                # position ids: mrope | arange
    # what classifier-free guidance contrasts with
    null: str = "prompt"              # null_prompt within t2i_text (prompt), as the user's whole
    null_prompt: str = ""             # turn (turn), or zeros after the connector (zeros)
    null_edit: str = ""               # the prompt for edits, which keep their images
    # flow
    size: int = 64                    # pixels
    vae_factor: int = 4               # pixels per latent, one side
    t_dist: str = "logit-normal"      # training times: sigmoid(N(t_mean, 1)) | uniform
    t_mean: float = 0.0               # > 0 favours noisy times
    train_shift: float = 1.0          # time shift while training the flow
    world: int = 0                    # the classroom's version that it learned; 0: not told
    sample_shift: float = 1.0
    grid: str = "uniform"             # times to step on: uniform | diffusers, see sigmas
    solver: str = "euler"             # of the ODE: euler | dpm, see dpm_step; RL steps by Euler
    mmdit: dict = field(default_factory=dict)   # the DiT's own arguments: MMDiT's
    sana: dict = field(default_factory=dict)    # or SanaDiT's
    dit_class: str = ""               # or a DiT of your own, "file.py:Class" (docs/forking.md),
    dit_args: dict = field(default_factory=dict)                    # and its arguments
    # the paper's values for the flags of pretrain.py, sft.py and RL (there its recipe's name, and
    # what belongs to the model); None: it has no such stage
    stage1: dict | None = field(default_factory=dict)
    stage2: dict | None = field(default_factory=dict)
    stage3: dict | None = field(default_factory=dict)

    @property
    def dit_config(self):
        return self.mmdit or self.sana or self.dit_args


PARTS = ("vlm", "dit", "vae")             # what the flags of these names replace; and --refs
REFS = ("vlm", "dit", "both")
NORMS, KLS = ("group", "joint", "global"), ("mean", "flow-grpo", "velocity")    # of RL

# Stable Diffusion 3.5 Medium. Its VAE's own config holds the scaling: 1.5305 (z - .0609).
SD35M = dict(
    size=512, vae_factor=8, sample_shift=3.0, grid="diffusers",
    mmdit=dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24,
               attention_head_dim=64, num_attention_heads=24, caption_projection_dim=1536,
               joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=384,
               dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
)  # fmt: skip

# SANA 1.6B, on the latents of a DC-AE: .41407 z
SANA = dict(sample_size=32, patch_size=1, in_channels=32, out_channels=32, num_layers=20,
            num_attention_heads=70, attention_head_dim=32, num_cross_attention_heads=20,
            cross_attention_head_dim=112, cross_attention_dim=2240, caption_channels=2304,
            mlp_ratio=2.5)  # fmt: skip
TALK = dict(
    think_text="Write a detailed prompt for an image generator that draws what is described below. "
               "First reason about what must be seen, within <think> </think>; then give the "
               "prompt, within <answer> </answer>.\n{}",
    answer_text="{images}{}\nFirst reason within <think> </think>, then give a short answer within "
             "<answer> </answer>.",
    critique_text="{images}Does the image match the prompt: {}? Answer yes, or no and what has to "
               "change.")
QWEN_3B = dict(vlm="Qwen/Qwen2.5-VL-3B-Instruct", vlm_dim=2048, **TALK)      # 36 layers
QWEN_7B = dict(vlm="Qwen/Qwen2.5-VL-7B-Instruct", vlm_dim=3584, **TALK)      # 28 layers

# OpenUni's way to ask InternVL3 (28 layers); its ViT takes 448 x 448 pixels, whatever the image.
INTERNVL_2B = dict(
    vlm="OpenGVLab/InternVL3-2B-hf", vlm_dim=1536, keep="query", n_query=256, pos="arange", **TALK,
    image_tokens=("<img>", "<IMG_CONTEXT>", "</img>"), suffix="<img>", null="turn",
    null_prompt="Generate an image.", null_edit="Keep the image as it is.",
    c_dim=1536, c_ff=8960, c_layers=6, c_heads=24, vae_factor=32, t_dist="uniform",
    sample_shift=3.0, solver="dpm", vae="mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
)  # fmt: skip
BLURRY = ("blurry, low quality, low resolution, distorted, deformed, broken content, missing parts,"
          " damaged details, artifacts, glitch, noise, pixelated, grainy, compression artifacts, "
          "bad composition, wrong proportion, incomplete editing, unfinished, unedited areas.")

# AdamW (.9, .95), cosine, clipped at norm 1, no average of the weights.
FLOW = dict(wd=0.05, ema=0.0, eval_every=1000)

# RL: what a paper does, whichever its model, as flags of grpo.py (--recipe). Flow-GRPO trains the
# first 9 of 10 steps, 1 to .0089; the tiny one that is left also adds noise there, see sde_step.
RL = dict(T=10, grid="diffusers", window=9, window_stop=0, kind="flow", eta=0.7,
          shared_noise=False, clip=1e-4, ema=0.0)  # fmt: skip
RECIPES = {
    # What is soonest at a held-out gain in the classroom: grpo.py's own defaults.
    "fast": {},
    # Flow-GRPO's public code, config geneval_sd3. Its average, .9 every 8th update, is .987 here.
    # Departs from it: the null branch of guidance is learned through, as the policy is their sum.
    "flow-grpo": RL | dict(B=48, G=24, guidance=4.5, norm="global", updates=2, lr=3e-4, wd=1e-4,
                           beta=0.04, kl="flow-grpo", lora_rank=32, lora_alpha=64, ema=0.987,
                           eval_T=40),
    # DeepGen 1.0, tables 10 and 11: all steps but the last are random; 30 of the 50, anew in each
    # iteration, are trained. In its SFT data, too, text weighs three times: that is the folder's.
    "mr-grpo": dict(steps=1500, B=32, G=8, T=50, grid="diffusers", window=49, window_stop=0,
                    trained=30, kind="cps-simple", eta=1.0, shared_noise=True, norm="group",
                    lr=2e-6, clip=1e-4, beta=5e-7, kl="velocity", sft=1e-4, sft_batch=256, ema=0.0,
                    eval_T=50, mix="text:3,*:1",
                    reward=json.dumps({"text": "preference:0.2,clip:0.1,ocr:0.7",
                                       "*": "preference:0.7,clip:0.3"})),
    # UniRL-Zero's public code. Departs from it: there the last step is trained as well, with the
    # little noise that it adds.
    "unirl-zero": RL | dict(B=8, G=8, guidance=3.5, norm="joint", train="both", lr=1e-5, beta=4e-3,
                            kl="mean"),
    # UniPic 2.0, section 4.1, after Flow-GRPO; its guidance is not told.
    "unipic2": RL | dict(B=16, G=16, guidance=3.5, norm="joint", lr=3e-4, beta=0.04, kl="flow-grpo",
                         lora_rank=32, lora_alpha=64),
    # ParaUni, section 4.1; what it leaves open is Flow-GRPO's for PickScore. Its rewards follow one
    # another: then --reward pickscore --init of the first run's folder, then clip.
    "parauni": RL | dict(B=32, G=16, guidance=4.5, norm="global", updates=2, train="both", lr=1e-4,
                         wd=0.05, beta=0.01, kl="flow-grpo", reward="aesthetic",
                         ldam="clip:24-28,pickscore:12-23,aesthetic:12-23"),
}  # fmt: skip
PRESETS = {c.preset: c for c in (
    # The classroom: every part is the real class at small size, trained by data/shapes/prepare.py
    Config(
        preset="shapes", vlm="data/shapes/vlm", dit="data/shapes/dit", vae="data/shapes/vae",
        text_encoder="data/shapes/clip", bridge="scb", layers=(6, 4, 2), t_mean=1.8,
        sample_shift=3.0, world=2,
        mmdit=dict(sample_size=16, patch_size=4, in_channels=4, out_channels=4, num_layers=6,
                   attention_head_dim=32, num_attention_heads=4, caption_projection_dim=128,
                   joint_attention_dim=128, pooled_projection_dim=128, pos_embed_max_size=16,
                   qk_norm="rms_norm"),
    ),
    Config(
        preset="shapes-sana", vlm="data/shapes/vlm", dit="data/shapes/sana/dit",
        vae="data/shapes/vae", text_encoder="data/shapes/clip", bridge="lim",
        layers=(1, 2, 3, 4, 5, 6), keep="query", n_query=16, t_mean=1.2, sample_shift=3.0, world=1,
        sana=dict(sample_size=16, patch_size=4, in_channels=4, out_channels=4, num_layers=8,
                  num_attention_heads=4, attention_head_dim=32, num_cross_attention_heads=4,
                  cross_attention_head_dim=32, cross_attention_dim=128, caption_channels=128,
                  mlp_ratio=2.5, qk_norm="rms_norm_across_heads", ref="add"),
        stage1=dict(steps=450), stage2=dict(steps=1200), stage3=dict(init="data/shapes/sana/sft"),
    ),
    # UniRL-Zero (2510.17937), appendix A and its scripts. Bridge and DiT learn together from the
    # start: `sft.py`. References are added to the DiT's input.
    Config(
        preset="unirl-zero", **QWEN_3B, bridge="last", keep="query", n_query=256, edit_queries=True,
        dit="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers/transformer", ref_noise=0.2,
        vae="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers/vae",
        system="You are a helpful assistant.", vit_scale=672 / 1024, pos="arange", null="zeros",
        # Departs from its RL code, which words both requests a little otherwise than pretraining.
        t2i_text="Please generate image based on the following caption: {}",
        edit_text="{images}\nPlease edit the given image based on the folllowing instruction: {}.",
        c_style="rms", c_dim=2048, c_ff=4096, c_layers=12, c_heads=8,
        size=1024, vae_factor=32, sample_shift=3.0, grid="diffusers", sana=SANA | dict(ref="add"),
        stage1=None,
        stage2=FLOW | dict(init="", steps=240_000, batch=128, lr=1e-4, warmup=720, wd=0.0),
        stage3=dict(recipe="unirl-zero", init="out/sft"),
    ),
    # DeepGen 1.0, table 9 (warm-up: the table's 1%, not the text's 20,000 steps); of edits its code
    # withholds nothing.
    Config(
        preset="deepgen", **QWEN_3B, **SD35M, bridge="scb", layers=tuple(range(35, 0, -6)),
        keep="all", n_query=128, vit_scale=28 / 32, null_edit=BLURRY,
        dit="Skywork/UniPic2-SD3.5M-Kontext-2B/transformer",
        vae="Skywork/UniPic2-SD3.5M-Kontext-2B/vae",
        c_dim=2048, c_ff=11946, c_layers=6, c_heads=32, t_dist="uniform", train_shift=3.0,
        stage1=FLOW | dict(steps=200_000, batch=512, lr=1e-4, warmup=2000, edit_drop=0.0),
        stage2=FLOW | dict(steps=400_000, batch=768, lr=5e-5, warmup=4000, edit_drop=0.0,
                           vlm_lora_rank=64, vlm_lora_alpha=128, vlm_lora_dropout=0.05),
        stage3=dict(recipe="mr-grpo", init="out/sft"),
    ),
    # Flow-GRPO: RL only, on SD3.5-M as it is.
    Config(
        preset="flow-grpo", **SD35M, bridge="text", text="sd3", t5_tokens=128, refs="none",
        dit="stabilityai/stable-diffusion-3.5-medium/transformer",
        vae="stabilityai/stable-diffusion-3.5-medium/vae",
        text_encoder="stabilityai/stable-diffusion-3.5-medium",
        stage1=None, stage2=None,
        stage3=dict(recipe="flow-grpo", init="", micro=9),
    ),
    # UniPic 2.0, section 4.1: first the DiT learns to edit, and RL starts from there ...
    Config(
        preset="unipic2-kontext", **SD35M, bridge="text", text="sd3", null_edit=BLURRY, refs="dit",
        dit="Skywork/UniPic2-SD3.5M-Kontext-2B/transformer",
        vae="Skywork/UniPic2-SD3.5M-Kontext-2B/vae",
        text_encoder="Skywork/UniPic2-SD3.5M-Kontext-2B", t_dist="uniform", train_shift=3.0,
        stage1=None,
        stage2=FLOW | dict(init="", steps=200_000, batch=128, lr=4e-5, warmup=2000),
        stage3=dict(recipe="unipic2", init=""),
    ),
    # ... then a VLM learns to speak to it. Its training code is not public: times are DeepGen's.
    Config(
        preset="unipic2", **QWEN_7B, **SD35M, bridge="last", keep="query", n_query=256,
        dit="Skywork/UniPic2-Metaquery-9B/transformer", vae="Skywork/UniPic2-Metaquery-9B/vae",
        edit_text="{images}{}", vit_scale=28 / 32, pos="arange", null_edit=BLURRY,
        c_dim=1536, c_ff=8960, c_layers=24, c_heads=24, t_dist="uniform", train_shift=3.0,
        stage1=FLOW | dict(steps=500_000, batch=1024, lr=1e-4, warmup=5000),
        stage2=FLOW | dict(steps=200_000, batch=128, lr=4e-5, warmup=2000),
        stage3=dict(recipe="unipic2", init="out/sft"),
    ),
    # ParaUni, section 4.1; its code is OpenUni's, and so are steps and warm-up (in that code stage
    # 2's lr is 1e-5).
    Config(
        preset="parauni", **INTERNVL_2B, bridge="lim", layers=tuple(range(1, 29)), size=1024,
        refs="vlm",
        dit="Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers/transformer",
        sana=SANA | dict(qk_norm="rms_norm_across_heads"),
        stage1=FLOW | dict(steps=100_000, batch=512, lr=1e-4, warmup=1000),
        stage2=FLOW | dict(steps=10_000, batch=512, lr=1e-4, warmup=100),
        stage3=dict(recipe="parauni", init="out/sft"),
    ),
    # OpenUni-L-512, its configs.
    Config(
        preset="openuni", **INTERNVL_2B, bridge="last", size=512, refs="vlm",
        dit="Efficient-Large-Model/Sana_1600M_512px_diffusers/transformer",
        sana=SANA | dict(sample_size=16),
        stage1=FLOW | dict(steps=100_000, batch=512, lr=1e-4, warmup=1000),
        stage2=FLOW | dict(steps=10_000, batch=256, lr=1e-5, warmup=100),
        stage3=None,
    ),
)}  # fmt: skip


def reference_ways(cfg, dit):
    """What is shown an edit's images: {"vlm", "dit"}, or one of them; or the user's error."""
    able = {"vlm"} if cfg.bridge != "text" else set()
    able |= {"dit"} if dit.most_refs != 0 else set()
    asked = dict(both={"vlm", "dit"}, vlm={"vlm"}, dit={"dit"}, none=set()).get(cfg.refs)
    if asked is None:
        fail(f"unknown --refs {cfg.refs!r}; there are: {', '.join(REFS)}")
    if not asked or not asked <= able:
        fail(f"preset {cfg.preset!r} cannot edit with --refs {cfg.refs}; it can show images to: "
             f"{', '.join(sorted(able)) or 'nobody'}")
    return asked


def preset(name):
    if name not in PRESETS:
        fail(f"unknown --preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]
