import pytest
import tiny


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folder with a tiny model's vlm/, vae/, dit/, sft/, prompts.jsonl; see tiny.py."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.make(folder)
    return folder
