"""
The thresholds of policies/teal.py: quantiles of what the matrices of a checkpoint read, in a JSON file beside it.

    python experiments/fit_teal.py --text notes.txt                     the demo model, or that of --ckpt
    python generate.py --policy teal --skip 0.25 "..."                  finds the file beside the checkpoint
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import support  # noqa: I001, F401 (before PyTorch: Ctrl-C)

from load_weights import load
from policies import teal
from support import common
from support.measuring import read_text, text_windows


def parse_args(argv):
    parser = common.Parser(__doc__)
    common.add_model_arguments(parser)
    add = parser.add_argument
    add("--text", nargs="+", required=True, metavar="FILE", help='plain text or JSON lines with a key "text"')
    add("--tokens", type=common.positive, default=4096, metavar="N", help="of text to work on (default 4096)")
    add("--out", metavar="FILE", help="default: teal.json beside the checkpoint")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_args(argv)
    ckpt = common.find_checkpoint(options.ckpt)
    out = Path(options.out) if options.out else common.beside(ckpt, teal.make.fit)
    common.check_outputs(out)
    texts = [read_text([file]) for file in options.text]
    tokenizer, model = load(ckpt, common.find_device(options.device), options.dtype)
    windows, quantiles, size = [], {}, min(512, model.args.max_seq_len)
    for text in texts:
        windows += text_windows(tokenizer, text, max(1, options.tokens // len(texts)), size)
    if not windows:
        raise ValueError(f"{', '.join(options.text)}: no text")
    for place, values in teal.find_quantiles(model, windows).items():
        quantiles[place] = values.mul(1e4).round().div(1e4).tolist()
    about = dict(
        model=common.model_name(ckpt), weights_checksum=common.fingerprint(model),
        text=[Path(file).name for file in options.text], quantiles=quantiles,
    )  # fmt: skip
    common.write_whole(out, json.dumps(about) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    common.run_command(main)
