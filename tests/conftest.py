import logging
import os

# What is said here to be equal, to the last bit, is so where sums have one order: on one thread,
# and with a matrix product that does not ask where in memory its inputs lie. Before torch starts.
os.environ["MKL_CBWR"] = "AUTO,STRICT"

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)                       # nothing here is large enough for two


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
