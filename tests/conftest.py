import os
import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent))

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

# print_blob: a failure prints the decorator that reproduces it, also from CI, where the same examples run every time
settings.register_profile("tests", deadline=None, max_examples=25, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("tests")
