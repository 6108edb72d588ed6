import logging
import os

# On several threads sums have no fixed order: what is said here to be equal, to the last bit, is so
# on one; and nothing here is large enough for two. The scripts keep to it, too: see model.setup.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""                  # also where there are GPUs: see gpu.py

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


class Deprecated(logging.Handler):
    """Hugging Face's libraries log what is deprecated, where Python would warn of it. As with
    warnings (pyproject.toml), a call of ours that earns such a line fails."""

    def emit(self, record):
        if "deprecat" in record.getMessage().lower():
            raise DeprecationWarning(record.getMessage())


for library in ("transformers", "diffusers", "peft", "huggingface_hub"):
    logging.getLogger(library).addHandler(Deprecated())


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folder with a tiny model's vlm/, vae/, dit/, sft/, prompts.jsonl; see tiny.py."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.make(folder)
    return folder
