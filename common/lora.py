"""A DiT's LoRA in files, as peft and as diffusers write it: read, and written for both."""

import json
from collections import Counter
from math import isfinite
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file

from common.run import fail
from common.weights import attempt, json_object, read_safetensors, sound

PEFT, DIFFUSERS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
# The fields of peft's LoraConfig that say what is to be merged, and which values they may have.
# peft's own merge computes all of them. Others would change the model otherwise (bias,
# modules_to_save, layer_replication, ...) or in a way that this version does not know.


def whole(x):
    return type(x) is int and x > 0


def number(x):
    return type(x) in (int, float) and isfinite(x)


def names(x):
    return isinstance(x, str) or isinstance(x, (list, tuple, set)) and all(
        isinstance(name, str) for name in x)


def table(of):
    return lambda x: isinstance(x, dict) and all(map(of, x.values()))


MERGED = dict(
    r=whole, lora_alpha=number, lora_dropout=lambda x: number(x) and 0 <= x <= 1,
    target_modules=names, exclude_modules=names, rank_pattern=table(whole),
    alpha_pattern=table(number), layers_pattern=names,
    layers_to_transform=lambda x: type(x) is int or isinstance(x, list) and all(
        type(i) is int for i in x),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"),
                    lambda x: isinstance(x, bool)),
    # Others, such as PiSSA's, begin by changing the weights that the LoRA is added to.
    init_lora_weights=lambda x: x in (True, False, "gaussian", "orthogonal", "eva"))
SILENT = ("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
          "inference_mode", "peft_version", "runtime_config")           # change no weight


def lora_config(values, where):
    """What a file says of a LoRA -> LoraConfig, or one line if it is not one that peft's merge
    computes as it was trained."""
    if not isinstance(values, dict):
        fail(f"{where}: a LoRA's config is a JSON object, not a {type(values).__name__}")
    if values.get("peft_type", "LORA") != "LORA":
        fail(f"{where} is no LoRA but a {values['peft_type']!r}: its peft_type must be LORA")
    usual, given = LoraConfig().to_dict(), {k: v for k, v in values.items()
                                            if k in MERGED and v is not None}
    for k, v in given.items():
        if not MERGED[k](v):
            fail(f"{where}: {k} cannot be {v!r:.80} in a LoRA that is to be merged")
    for k, v in values.items():
        off = v is False or v in (None, "", [], {}) or k in usual and v == usual[k]
        if not off and k not in given and k not in SILENT:
            fail(f"{where} has {k} {v!r:.80}, which is not read here: merge it where it was "
                 "trained, and give the merged transformer's folder as --init")
    return attempt(f"{where} is no LoRA's config", lambda: LoraConfig(**given))


def lora_files(path):
    """Is there a LoRA in a folder? -> by whom: "peft", "diffusers" or ''"""
    if (path / DIFFUSERS).exists() and not (path / PEFT).exists():
        return "diffusers"
    return "peft" if (path / "adapter_config.json").exists() else ""


def read_lora(path):
    """A folder of peft or of diffusers -> {peft's name: tensor}, LoraConfig"""
    if lora_files(path) == "diffusers":
        return from_diffusers(path / DIFFUSERS)
    file, about = path / PEFT, path / "adapter_config.json"
    config = lora_config(json_object(about), about)
    if not file.exists():
        fail(f"{path} is no LoRA: it needs peft_type LORA, and {PEFT}")
    tensors = read_safetensors(file)[0]
    return only_lora(file, {k.removeprefix("base_model.model."): v
                            for k, v in tensors.items()}), config


def only_lora(file, tensors):
    if strange := [k for k in tensors if "lora_" not in k]:
        fail(f"{file} holds more than a LoRA: {len(strange)} names, first {strange[0]}")
    return sound(file, tensors)


def from_diffusers(file):
    """As diffusers' load_lora_adapter understands a file: by the config in its metadata, else a
    module's rank is that of its tensors, and its alpha the rank or what `<module>.alpha` says."""
    tensors, metadata = read_safetensors(file)
    strange = [k for k in tensors if not k.startswith("transformer.")]
    if strange or not tensors:
        fail(f"{file} is no LoRA of a transformer alone: {len(strange)} of its {len(tensors)} "
             "names do not begin with transformer." + f", first {strange[0]}" * bool(strange))
    tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    alphas = {k.removesuffix(".alpha"): tensors.pop(k) for k in [*tensors] if k.endswith(".alpha")}
    only_lora(file, tensors)
    if "lora_adapter_metadata" in metadata:
        if alphas:
            fail(f"{file} states alpha twice: in its metadata and as {[*alphas][0]}.alpha")
        try:
            about = dict(json.loads(metadata["lora_adapter_metadata"]))
        except (ValueError, TypeError, RecursionError) as e:
            fail(f"{file}: lora_adapter_metadata is no JSON object ({e})")
        return tensors, lora_config({k.removeprefix("transformer."): v for k, v in about.items()
                                     if k.startswith("transformer.")}, file)
    ranks = {k.partition(".lora_B.")[0]: v.shape[1] for k, v in tensors.items()
             if k.endswith(".lora_B.weight") and v.ndim > 1}
    wrong = [f"{k}.alpha" for k, v in alphas.items() if k not in ranks or v.numel() != 1]
    if not ranks or wrong:
        fail(f"{file} is no LoRA as diffusers writes it: it has "
             + (f"{wrong[0]}, of no module or not one number" if wrong else "no lora_B.weight"))
    alphas = ranks | {k: v.item() for k, v in alphas.items()}
    (r, _), (alpha, _) = (Counter(of.values()).most_common(1)[0] for of in (ranks, alphas))
    return tensors, lora_config(dict(
        r=r, lora_alpha=alpha, target_modules=[*ranks],
        rank_pattern={f"^{k}": v for k, v in ranks.items() if v != r},
        alpha_pattern={f"^{k}": v for k, v in alphas.items() if v != alpha},
        use_dora=any("lora_magnitude_vector" in k for k in tensors),
        lora_bias=any(k.endswith("lora_B.bias") for k in tensors)), file)


def write_lora(home, config, tensors, base, dit=True):
    """A folder that peft loads. tensors: {peft's name: tensor}; base: what the LoRA is added to.
    Of a DiT also diffusers, and --init."""
    config.base_model_name_or_path = base
    config.save_pretrained(home)
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, Path(home) / PEFT,
              {"format": "pt"})
    if not dit:
        return
    # Only what counts: an older peft would refuse, by diffusers, fields that it does not know.
    about = {k: getattr(config, k) for k in ("r", "lora_alpha", "rank_pattern", "alpha_pattern",
                                             "use_rslora", "use_dora", "lora_bias")}
    about["target_modules"] = sorted({k.partition(".lora_")[0] for k in tensors})
    save_file({f"transformer.{k}": v for k, v in tensors.items()}, Path(home) / DIFFUSERS,
              {"format": "pt", "lora_adapter_metadata": json.dumps(
                  {f"transformer.{k}": v for k, v in about.items()}, sort_keys=True)})
