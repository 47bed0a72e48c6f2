import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parent.parent
sys.path[:0] = str(ROOT), str(ROOT / "experiments")

from tiny import tiny_model

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

# print_blob: a failure prints the decorator that reproduces it, also from CI, where the same examples run every time
settings.register_profile("tests", deadline=None, max_examples=25, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("tests")


@pytest.fixture
def model():
    """A tiny model for ASCII text, whose ids are its bytes: its tokenizer is tiny.Bytes."""
    return tiny_model(n_layers=6, vocab_size=128, max_seq_len=1024)
