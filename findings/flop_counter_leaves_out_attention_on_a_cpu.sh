#!/usr/bin/env bash
# torch 2.13.0 (Python 3.11): torch.utils.flop_counter counts nothing for scaled_dot_product_attention on a CPU. There it
# runs aten::_scaled_dot_product_flash_attention_for_cpu, for which the counter has no formula; it says so nowhere, and
# the rest of the model is counted. Where the kernel is the plain one (SDPBackend.MATH), or attention runs on a GPU,
# the same call is counted, for all pairs of a query and a key even if it is causal.
#
# One guesses that the count is a property of the model. It depends on the kernel that PyTorch chooses: of a text of
# 4,096 tokens through the attention of one layer of LLaMA-2-7B a third of the operations is missing on a CPU, of longer
# texts more. A bound or a utilisation that is computed from it is wrong by as much.
#
# What helps: count within torch.nn.attention.sdpa_kernel(SDPBackend.MATH), and halve that part where it is causal.
# Output seen:
#
#     projections alone: 549755813888
#     projections and attention, as PyTorch chooses: 549755813888
#     projections and attention, with the plain kernel: 824633720832
#
# Ends with status 1 where that is not so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy

cat > "$folder/count.py" <<'PYTHON'
import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TOKENS, HEADS, HEAD_DIM = 4096, 32, 128
x = torch.randn(1, TOKENS, HEADS * HEAD_DIM, dtype=torch.bfloat16)
w = torch.randn(HEADS * HEAD_DIM, HEADS * HEAD_DIM, dtype=torch.bfloat16)


def layer(attend):
    q, k, v = (F.linear(x, w).view(1, TOKENS, HEADS, HEAD_DIM).transpose(1, 2) for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True) if attend else q
    return F.linear(out.transpose(1, 2).reshape(x.shape), w)


def count(name, attend, kernel=contextlib.nullcontext()):
    with FlopCounterMode(display=False) as counter, kernel, torch.no_grad():
        layer(attend)
    print(f"{name}: {counter.get_total_flops()}")
    return counter.get_total_flops()


alone = count("projections alone", attend=False)
chosen = count("projections and attention, as PyTorch chooses", attend=True)
plain = count("projections and attention, with the plain kernel", attend=True, kernel=sdpa_kernel(SDPBackend.MATH))
raise SystemExit(not (chosen == alone and plain == alone + 2 * 2 * HEADS * HEAD_DIM * TOKENS**2))
PYTHON
"$folder/venv/bin/python" "$folder/count.py"
