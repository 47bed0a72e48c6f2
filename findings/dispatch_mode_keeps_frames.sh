#!/usr/bin/env bash
# torch 2.13.0 (Python 3.11): the first operation of a process under a TorchDispatchMode keeps the local variables of
# the functions that were running, after they have returned, until Python's next search for cycles. That operation
# imports torch._dynamo; a module of it calls torch.fx.wrap, which has its own frame in a local variable. This is a
# cycle, and from it f_back leads to every frame on the stack. From the second operation on nothing is kept.
#
# One guesses that what a function alone refers to is freed when the function returns, as it is everywhere else in
# PyTorch: a model or a cache of a function's own is not, and its memory, on a GPU gigabytes that Python knows nothing
# of, is free only when gc happens to run. A test that nothing outlives its last user fails where it is the first of
# its process, and passes after any other.
#
# What helps: import torch._dynamo before, at the top of a file. Output seen:
#
#     first call: kept after it has returned
#     second call: freed
#     first call, after import torch._dynamo: freed
#
# Ends with status 1 where that is not so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy

cat > "$folder/kept.py" <<'PYTHON'
import gc
import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PassOn(TorchDispatchMode):
    """Does with every operation what would have been done without it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Mine:
    pass


def work():
    """A weak reference to a local variable."""
    mine = Mine()
    with PassOn():
        torch.ones(3).masked_fill(torch.ones(3, dtype=torch.bool), 0.0)
    return weakref.ref(mine)


gc.disable()  # which would free it at some time that nobody knows
when = ""
if "import" in sys.argv:
    import torch._dynamo

    when = ", after import torch._dynamo"
print(f"first call{when}: {'freed' if work()() is None else 'kept after it has returned'}")
if not when:
    print(f"second call: {'freed' if work()() is None else 'kept after it has returned'}")
PYTHON

cd "$folder"
seen=$(venv/bin/python kept.py && venv/bin/python kept.py import)
echo "$seen"
expected="first call: kept after it has returned
second call: freed
first call, after import torch._dynamo: freed"
[ "$seen" = "$expected" ]
