#!/usr/bin/env bash
# transformers 5.24.0 with sentencepiece 0.2.1 and protobuf 6.33.0 (Python 3.11): AutoTokenizer makes other tokens from
# the tokenizer.model of LLaMA-1 and 2 than sentencepiece, llama.cpp and transformers 4 do.
#
# It takes the vocabulary out of the file and builds a BPE of its own, which differs in two ways. A space at the
# beginning of a text is lost: the space that stands before every text takes its place. And merges are ranked by the
# ids of the pieces that they make, not by their scores. In these files pieces of spaces alone have low ids and the
# score -1e9, which says that they come last; here they come first, so that "a  b" and indented code are cut elsewhere.
# No warning is printed, and decoding gives nearly the same text.
#
# One guesses that a file made by sentencepiece is read as sentencepiece reads it. With LLaMA-2's own file every line of
# WikiText-2 has other tokens, since all begin with a space; whoever compares the perplexities of two programs compares
# two texts. What helps: a tokenizer.json made by transformers 4 for the merges, and sentencepiece itself for both.
#
# The file is trained here, and its pieces of spaces get the score that they have in LLaMA's. Output seen:
#
#     The quick: the same
#     ' The quick': ▁ ▁T he ▁qu ick | ▁T he ▁qu ick
#     'a  b': ▁a ▁ ▁b | ▁a ▁▁ b
#
# Ends with status 1 where that is not so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 sentencepiece==0.2.1 protobuf==6.33.0

cat > "$folder/cut.py" <<'PYTHON'
import io
import json

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

text = ["The quick brown fox jumps over the lazy dog.", "a b a b c b    c   b  c", "def f():\n    return 1"] * 40
trained = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(text), model_writer=trained, vocab_size=330, model_type="bpe", byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
    hard_vocab_limit=False, minloglevel=2,
)
model = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
for piece in model.pieces:
    if len(piece.piece) > 1 and not piece.piece.strip("▁"):
        piece.score = -1e9
with open("tokenizer.model", "wb") as file:
    file.write(model.SerializeToString())
with open("config.json", "w") as file:
    json.dump(dict(model_type="llama"), file)
with open("tokenizer_config.json", "w") as file:
    json.dump(dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>"), file)

original = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model")
theirs = AutoTokenizer.from_pretrained(".")
if original.encode("The quick") == theirs.encode("The quick", add_special_tokens=False):
    print("The quick: the same")
for text in " The quick", "a  b":
    print(f"{text!r}: {' '.join(original.encode(text, out_type=str))} | {' '.join(theirs.tokenize(text))}")
PYTHON

cd "$folder"
seen=$(venv/bin/python cut.py 2> messages) || { cat messages; exit 1; }
echo "$seen"
expected="The quick: the same
' The quick': ▁ ▁T he ▁qu ick | ▁T he ▁qu ick
'a  b': ▁a ▁ ▁b | ▁a ▁▁ b"
[ "$seen" = "$expected" ]
