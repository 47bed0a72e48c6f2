"""
What no reader must read. A program imports this folder before PyTorch, whose import takes a second: from then on Ctrl-C
ends it without a traceback.
"""

import sys
from pathlib import Path


def quiet(kind, error, trace):
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


ROOT = Path(__file__).resolve().parent.parent
program = getattr(sys.modules["__main__"], "__file__", None)
if program and Path(program).resolve().parent in (ROOT, ROOT / "experiments"):  # not where somebody imports us
    sys.excepthook = quiet
