#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0 (Python 3.11): the rotary settings that a configuration shows are not those that
# its model computes with, if config.json has original_max_position_embeddings at the top level too.
#
# As read, config.rope_parameters holds the number from inside rope_scaling. Building a model settles the same object a
# second time, when the one at the top level has become an attribute and counts before it: the frequencies are those of
# the other number, and the configuration now shows it. A configuration with both numbers is valid, and no warning
# is printed.
#
# One guesses that AutoConfig.from_pretrained gives what the model will use, so that a converter, or another program,
# may read it there without building a model: it gets other frequencies, here up to three times off.
# What helps: LlamaForCausalLM(config) on the meta device, and to read the configuration after it. Output seen:
#
#     as read: 8192
#     after a model was built from it: 1024
#     its frequencies are those of: 1024
#
# Ends with status 1 where that is not so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 torch==2.13.0

cat > "$folder/build.py" <<'PYTHON'
import json

from transformers import AutoConfig, LlamaForCausalLM

KEY = "original_max_position_embeddings"
SIZES = dict(model_type="llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
             vocab_size=32, max_position_embeddings=131072, rope_theta=500000.0)


def read(inner, **top):
    """The configuration of a config.json with this number inside rope_scaling."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, KEY: inner}
    with open("config.json", "w") as file:
        json.dump(SIZES | dict(rope_scaling=scaling) | top, file)
    return AutoConfig.from_pretrained(".")


def frequencies(config):
    return LlamaForCausalLM(config).model.rotary_emb.inv_freq.tolist()


config = read(8192, **{KEY: 1024})
print("as read:", config.rope_parameters[KEY])
found = frequencies(config)
print("after a model was built from it:", config.rope_parameters[KEY])
print("its frequencies are those of:", *[inner for inner in (8192, 1024) if frequencies(read(inner)) == found])
PYTHON

cd "$folder"
seen=$(venv/bin/python build.py 2> messages) || { cat messages; exit 1; }
echo "$seen"
expected="as read: 8192
after a model was built from it: 1024
its frequencies are those of: 1024"
[ "$seen" = "$expected" ]
