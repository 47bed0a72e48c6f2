"""
What no reader must read. A program imports this folder before PyTorch, whose import takes a second: from then on Ctrl-C
ends it without a traceback, and so does a PyTorch that is not there. How PyTorch's threads wait is chosen here too.
"""

import os
import sys
import time
from pathlib import Path


def quiet(kind, error, trace):
    if issubclass(kind, ModuleNotFoundError) and error.name == "torch":
        print("error: PyTorch is not installed for this Python: run make .venv/demo once, and then "
              ". .venv/bin/activate in each shell", file=sys.stderr)
    elif not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def running():
    """How many threads of this machine are using a core or wait for one, this one included; 1 where none can tell."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
    except OSError:  # no Linux
        return 1


def wait_asleep(environ, looks=3):
    """
    PyTorch's threads wait for each other by spinning, which is fastest while each has a core to itself. Where another
    program runs, all of them wait for the one whose core it shares. So if one does at each of so many looks, they are
    told to sleep instead, unless a user has chosen. OpenMP reads this once, when PyTorch is imported.
    """
    for _ in range(looks):
        if running() < 2 or environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
            return
        time.sleep(0.01)
    environ["OMP_WAIT_POLICY"] = "PASSIVE"


ROOT = Path(__file__).resolve().parent.parent
program = getattr(sys.modules["__main__"], "__file__", None)
if program and Path(program).resolve().parent in (ROOT, ROOT / "experiments"):  # not where somebody imports us
    sys.excepthook = quiet
    wait_asleep(os.environ)
