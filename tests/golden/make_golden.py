"""
Writes the checkpoints of this folder and the logits that `transformers` computes from them:

    pip install transformers protobuf gguf tokenizers llama-cpp-python && python tests/golden/make_golden.py

Random weights are drawn under Meta's names; `transformers` gets them through the permutation of its own conversion script, so
that nothing here shares a line with load_weights.py. The tokens are the first 8 ids of two sentences.

hf-llama3 and llama3-f16.gguf have the rotary frequencies of Llama-3.1, for an original context of 256 tokens; "llama3" are
the logits of the last 8 of "llama3_tokens", 250 tokens. They were made with transformers 5.24.0, torch 2.14.1 and gguf
0.19.0; the rest, which does not depend on the versions, with those of its day.

transformers.json is what transformers 5.24.0 makes of configurations: rotary frequencies, ends of text, and the ids of
a folder that has both tokenizer.model and tokenizer.json (the same vocabulary, without what cuts and joins a text).
llama_cpp.json is what llama-cpp-python 0.3.36 makes of tokens that a GGUF file adds to tokenizer.model.
"""

import copy
import itertools
import json
import shutil
import tempfile
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import tokenizers
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
TEXT = HERE / "text.txt"
N_LAYERS, DIM, HIDDEN, N_HEADS = 2, 32, 64, 4
LLAMA_3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=256)  # fmt: skip
VARIANTS = {
    "mha": dict(n_kv_heads=4),
    "gqa": dict(n_kv_heads=2),
    "mqa": dict(n_kv_heads=1),
    "tied": dict(n_kv_heads=2, tied=True),
    "theta": dict(n_kv_heads=2, rope_theta=500000.0),
    "llama3": dict(n_kv_heads=2, rope_theta=50000.0),
}


def meta_weights(vocab_size, n_kv_heads, tied, seed, dtype):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(shape, generator=random) * 1.5 * shape[-1] ** -0.5).to(dtype)

    def norm():
        return (1 + 0.2 * torch.randn(DIM, generator=random)).to(dtype)

    kv_dim = DIM // N_HEADS * n_kv_heads
    w = {"tok_embeddings.weight": draw(vocab_size, DIM) * 4, "norm.weight": norm()}
    if not tied:
        w["output.weight"] = draw(vocab_size, DIM)
    for i in range(N_LAYERS):
        for name, shape in dict(wq=(DIM, DIM), wk=(kv_dim, DIM), wv=(kv_dim, DIM), wo=(DIM, DIM)).items():
            w[f"layers.{i}.attention.{name}.weight"] = draw(*shape)
        for name, shape in dict(w1=(HIDDEN, DIM), w2=(DIM, HIDDEN), w3=(HIDDEN, DIM)).items():
            w[f"layers.{i}.feed_forward.{name}.weight"] = draw(*shape)
        w[f"layers.{i}.attention_norm.weight"], w[f"layers.{i}.ffn_norm.weight"] = norm(), norm()
    return w


def hugging_face_weights(w, n_kv_heads):
    """The names and the permutation of transformers' convert_llama_weights_to_hf.py."""

    def permute(weight, n_heads):
        rows, columns = weight.shape
        return weight.view(n_heads, rows // n_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)

    names = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    out = {}
    for name, weight in w.items():
        if name.endswith("wq.weight"):
            weight = permute(weight, N_HEADS)
        if name.endswith("wk.weight"):
            weight = permute(weight, n_kv_heads)
        for ours, theirs in names.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        top = {
            "tok_embeddings.weight": "model.embed_tokens.weight",
            "output.weight": "lm_head.weight",
            "norm.weight": "model.norm.weight",
        }
        out[top.get(name, f"model.{name}")] = weight
    return out


def config(vocab_size, dtype, n_kv_heads, rope_theta=10000.0, tied=False):
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=DIM, num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS, num_key_value_heads=n_kv_heads, intermediate_size=HIDDEN, vocab_size=vocab_size,
        rms_norm_eps=1e-5, rope_theta=rope_theta, max_position_embeddings=64, tie_word_embeddings=tied, hidden_act="silu",
        torch_dtype=str(dtype).removeprefix("torch."), bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def logits(hf_weights, settings, tokens):
    model = LlamaForCausalLM(LlamaConfig(**copy.deepcopy(settings))).float()
    state = {name: weight.float() for name, weight in hf_weights.items()}
    if settings["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model.eval()(tokens).logits


def params(vocab_size=-1, n_kv_heads=4):
    """As in LLaMA-2's params.json: vocab_size -1, and hidden_dim by Meta's rule."""
    return dict(dim=DIM, multiple_of=32, ffn_dim_multiplier=0.75, n_heads=N_HEADS, n_kv_heads=n_kv_heads, n_layers=N_LAYERS,
                norm_eps=1e-05, vocab_size=vocab_size)  # fmt: skip


def split(w, n):
    """Meta's model-parallel shards: wo and w2 and the embedding by columns, the norms whole, the rest by rows."""
    shards = [{} for _ in range(n)]
    for name, weight in w.items():
        dim = 1 if any(part in name for part in ("wo.", "w2.", "tok_embeddings")) else 0
        for i, shard in enumerate(shards):
            shard[name] = weight.clone() if "norm" in name else weight.chunk(n, dim)[i].clone()
    return shards


def rope_freqs(rope_theta):
    """The tensor of llama.cpp's convert_hf_to_gguf.py: what the frequencies of Llama-3.1 are divided by."""
    wavelength = 2 * np.pi * rope_theta ** (np.arange(0, DIM // N_HEADS, 2) / (DIM // N_HEADS))
    factor, low, high, context = (LLAMA_3[key] for key in list(LLAMA_3)[1:])
    smooth = (context / wavelength - low) / (high - low)
    factors = np.where(wavelength > context / low, factor, 1 / ((1 - smooth) / factor + smooth))
    return np.where(wavelength < context / high, 1, factors).astype(np.float32)


def write_gguf(path, w, n_kv_heads, vocabulary, quantised=None, rope_theta=10000.0, context=64):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(context)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(rope_theta)
    writer.add_rope_dimension_count(DIM // N_HEADS)
    vocabulary(writer)
    names = {
        "tok_embeddings": "token_embd", "norm": "output_norm", "attention.wq": "attn_q", "attention.wk": "attn_k",
        "attention.wv": "attn_v", "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "output": "output",
    }  # fmt: skip
    seen = {}
    if context > 64:
        writer.add_tensor("rope_freqs.weight", rope_freqs(rope_theta))
    for name, weight in w.items():
        layer, _, part = name.removesuffix(".weight").removeprefix("layers.").partition(".")
        new = f"blk.{layer}.{names[part]}.weight" if part else f"{names[layer]}.weight"
        data = weight.float().numpy()
        if quantised and data.ndim == 2:
            packed = gguf.quants.quantize(data, quantised)
            writer.add_tensor(new, packed, raw_dtype=quantised)
            data = gguf.quants.dequantize(packed, quantised)
        else:
            writer.add_tensor(new, data.astype(np.float16) if data.ndim == 2 else data)
        seen[name] = torch.from_numpy(np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return seen  # the weights as whoever reads the file sees them


LINEAR, TOP = dict(rope_type="linear", factor=4.0), "original_max_position_embeddings"
WITHOUT = {key: value for key, value in LLAMA_3.items() if key != TOP}
PLAIN = dict(rope_type="default", rope_theta=777.0)
ROPES = [  # changes of hf-llama3's config.json; null: that key is left out
    {}, {"rope_scaling": None}, {"rope_scaling": None, "rope_parameters": LLAMA_3},
    {"rope_parameters": PLAIN}, {"rope_scaling": PLAIN, "rope_parameters": LLAMA_3},
    {"rope_parameters": PLAIN, "rope_theta": None}, {"rope_scaling": LLAMA_3 | dict(rope_theta=777.0)},
    {"rope_scaling": None, "rope_parameters": PLAIN}, {"rope_scaling": {}, "rope_parameters": LLAMA_3},
    {TOP: 64}, {TOP: 128, "rope_scaling": WITHOUT}, {"rope_scaling": WITHOUT},
    {TOP: 32, "rope_scaling": None, "rope_parameters": LLAMA_3}, {TOP: 32, "rope_scaling": None},
    {"rope_scaling": LINEAR | dict(factor=1.0)}, {"rope_scaling": dict(type="dynamic", factor=1)},
    {"rope_scaling": LINEAR | dict(factor=1.0), "rope_parameters": LLAMA_3},
]  # fmt: skip
ENDS = [  # eos_token_id of config.json and of generation_config.json (null: it says none; "none": there is no file)
    (2, [7, 8]), (2, 7), ([2, 3], [7]), (2, "none"), ([2, 3], "none"), (0, "none"), (2, 0), ([9], [0, 9]),
]  # fmt: skip
TEXTS = "Paris is", "<s>user", "</s> user", "a</s>b", "a<s>  b", "  x  y", "def f():\n    return <s>1"
SPACES = ["prepend", "first", "always", "never"]
CLASSES = ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None]


def spaces(style):
    """What a tokenizer.json says of the space before a text: in its normalizer, or as a pre-tokenizer."""
    replace = dict(type="Replace", pattern=dict(String=" "), content="▁")
    if style == "prepend":
        parts = [dict(type="Prepend", prepend="▁"), replace]
        return dict(normalizer=dict(type="Sequence", normalizers=parts), pre_tokenizer=None)
    metaspace = dict(type="Metaspace", replacement="▁", prepend_scheme=style, split=False)
    return dict(normalizer=None, pre_tokenizer=metaspace)


def write_tokenizer_json(sp):
    """The vocabulary of a sentencepiece model as a tokenizer.json."""
    pieces = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = []
    for piece, i in pieces.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces and not sp.is_byte(i) and not sp.is_control(i):
                merges.append((-sp.get_score(i), piece[:cut], piece[cut:]))
    merges = [merge[1:] for merge in sorted(merges, key=lambda merge: merge[0])]
    model = tokenizers.models.BPE(pieces, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    tokenizer, decode = tokenizers.Tokenizer(model), tokenizers.decoders
    parts = decode.Replace("▁", " "), decode.ByteFallback(), decode.Fuse(), decode.Strip(" ", 1, 0)
    tokenizer.decoder = decode.Sequence(list(parts))
    special = [tokenizers.AddedToken(text, normalized=False, special=True) for text in ("<unk>", "<s>", "</s>")]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(HERE / "tokenizer.json"), pretty=False)


def write_transformers_json():
    """Each case is a folder, opened as a user of transformers opens it."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "tokenizer.model"))
    write_tokenizer_json(sp)
    plain = json.loads((HERE / "hf-llama3" / "config.json").read_text())
    out = dict(ropes=[], ends=[], texts=TEXTS, ids=[])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def write(name, value):
            (folder / name).write_text(json.dumps(value))

        for changes in ROPES:
            changed = plain | changes
            write("config.json", {key: value for key, value in changed.items() if value is not None})
            rotary = LlamaForCausalLM(AutoConfig.from_pretrained(folder)).model.rotary_emb
            out["ropes"].append([changes, rotary.inv_freq.double().tolist()])
        write("config.json", plain)
        LlamaForCausalLM(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
        for own, generation in ENDS:
            write("config.json", plain | dict(eos_token_id=own))
            write("generation_config.json", dict(eos_token_id=generation))
            if generation == "none":
                (folder / "generation_config.json").unlink()
            ends = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
            out["ends"].append([own, generation, ends if isinstance(ends, list) else [ends]])
        shutil.copy(HERE / "tokenizer.model", folder)
        parts = json.loads((HERE / "tokenizer.json").read_text())
        for style, legacy, name in itertools.product(SPACES, [None, False, True], CLASSES):
            write("tokenizer.json", parts | spaces(style))
            stated = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=legacy, tokenizer_class=name)
            stated = {key: value for key, value in stated.items() if value is not None}
            write("tokenizer_config.json", stated)
            ids = AutoTokenizer.from_pretrained(folder)(list(TEXTS))["input_ids"]
            out["ids"].append([spaces(style), stated, ids])
    lines = [f'"texts": {json.dumps(TEXTS)}']
    for key in "ropes", "ends", "ids":
        rows = ",\n".join(json.dumps(row) for row in out[key])
        lines.append(f'"{key}": [\n{rows}\n]')
    (HERE / "transformers.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
ADDED = [  # tokens after those of tokenizer.model, with their kinds
    *([["<|im_start|>", CONTROL], ["<|im_end|>", kind]] for kind in (NORMAL, CONTROL, USER_DEFINED)),
    *([["<|user|>", USER_DEFINED], ["\t\t", USER_DEFINED], ["<|end|>", kind]] for kind in (NORMAL, USER_DEFINED)),
    [["▁▁▁▁", USER_DEFINED], ["   ", USER_DEFINED], ["<|im_start|>user", USER_DEFINED], ["<|im_start|>", USER_DEFINED]],
    [["<end_of_turn>", NORMAL], ["<EOT>", USER_DEFINED], ["[EOT]", NORMAL], ["[EOS]", CONTROL], ["<eos>", USER_DEFINED]],
    [["<|eot_id|>", NORMAL], ["<|eom_id|>", USER_DEFINED], ["<|end_of_text|>", NORMAL], ["<|endoftext|>", CONTROL]],
]
ADDED_TEXTS = [
    "<|im_start|>user\nHi<|im_end|>\n", "<|user|>Paris is<|end|>", "a\t\tb \t\t c", "x    y       z", "<s>a</s> b",
    " <|user|> <|user|>a", "Paris<|im_start|>user<|im_start|>", "a<|eot_id|>b", "<end_of_turn> x<EOT>y", "",
]  # fmt: skip


def write_llama_cpp_json():
    """Lines of [added tokens, ends of text, the ids of each text]."""
    import llama_cpp

    sp, lines = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "tokenizer.model")), []
    for added in ADDED:
        n = range(sp.vocab_size())
        kinds = [2 * sp.is_unknown(i) or 3 * sp.is_control(i) or 6 * sp.is_byte(i) or 1 for i in n]
        with tempfile.TemporaryDirectory() as folder:
            writer = gguf.GGUFWriter(Path(folder) / "x.gguf", "llama")
            writer.add_tokenizer_model("llama")
            writer.add_token_list([sp.id_to_piece(i) for i in n] + [piece for piece, _ in added])
            writer.add_token_scores([sp.get_score(i) for i in n] + [-1000.0] * len(added))
            writer.add_token_types(kinds + [kind for _, kind in added])
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            model = llama_cpp.Llama(f"{folder}/x.gguf", vocab_only=True, verbose=False)
        vocab = llama_cpp.llama_model_get_vocab(model.model)
        ends = [i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]
        ids = [model.tokenize(text.encode(), add_bos=True, special=True) for text in ADDED_TEXTS]
        lines.append(json.dumps([added, ends, ids]))
    lines = ",\n".join(lines)
    text = f'{{"texts": {json.dumps(ADDED_TEXTS)},\n"added": [\n{lines}\n]}}\n'
    (HERE / "llama_cpp.json").write_text(text, encoding="utf-8")


def main():
    for path in HERE.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix in (".gguf", ".safetensors"):
            path.unlink()
    torch.manual_seed(0)
    sentencepiece.SentencePieceTrainer.train(
        input=str(TEXT), model_prefix=str(HERE / "tokenizer"), vocab_size=380, model_type="bpe", byte_fallback=True,
        character_coverage=0.999, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    (HERE / "tokenizer.vocab").unlink()
    sp = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "tokenizer.model"))
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    digits, byte_level = tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(False)
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.Sequence([digits, byte_level]), tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train([str(TEXT)], trainer)
    vocab_size = sp.vocab_size()
    assert vocab_size == bpe.get_vocab_size() == 380
    tokens = torch.tensor(
        [sp.encode(line)[:8] for line in ("The capital of France is Paris, on the Seine.", "Layers 3 to 27 may skip: why?")]
    )
    out = dict(tokens=tokens, llama3_tokens=torch.tensor([sp.encode(TEXT.read_text(encoding="utf-8"))[:250]]))

    def write_sp(folder):
        shutil.copy(HERE / "tokenizer.model", folder / "tokenizer.model")

    def write_json(path, value):
        path.write_text(json.dumps(value, indent=1) + "\n")

    def sentencepiece_vocabulary(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([sp.id_to_piece(i).encode() for i in range(vocab_size)])
        writer.add_token_scores([sp.get_score(i) for i in range(vocab_size)])
        kind = lambda i: 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
        writer.add_token_types([kind(i) for i in range(vocab_size)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    def bpe_vocabulary(writer):
        model = json.loads(bpe.to_str())["model"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
        writer.add_token_types([3 if i < 3 else 1 for i in range(vocab_size)])
        writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(False)
        template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        writer.add_chat_template(template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

    for seed, (name, sizes) in enumerate(VARIANTS.items()):
        dtype = torch.float16 if name in ("gqa", "theta", "llama3") else torch.bfloat16
        tied, n_kv_heads = sizes.get("tied", False), sizes["n_kv_heads"]
        w = meta_weights(vocab_size, n_kv_heads, tied, seed, dtype)
        more = dict(rope_scaling=LLAMA_3, max_position_embeddings=512) if name == "llama3" else {}
        hf, settings = hugging_face_weights(w, n_kv_heads), config(vocab_size, dtype, **sizes) | more
        out[name] = logits(hf, settings, out["llama3_tokens"])[:, -8:].clone() if more else logits(hf, settings, tokens)
        folder = HERE / f"hf-{name}"
        folder.mkdir()
        if name == "theta":  # the spelling of transformers 5, and a tokenizer.json
            settings["rope_parameters"] = dict(rope_type="default", rope_theta=settings.pop("rope_theta"))
            settings["dtype"] = settings.pop("torch_dtype")
            bpe.save(str(folder / "tokenizer.json"))
            write_json(folder / "tokenizer_config.json", dict(bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"}))
            write_json(folder / "generation_config.json", dict(eos_token_id=[2, 0]))
        else:
            write_sp(folder)
        write_json(folder / "config.json", settings)
        hf = {key: weight.contiguous() for key, weight in hf.items()}
        halves = [dict(list(hf.items())[: len(hf) // 2]), dict(list(hf.items())[len(hf) // 2 :])]
        if name == "mha":
            files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
            for file, half in zip(files, halves):
                save_file(half, folder / file, metadata=dict(format="pt"))
            index = {key: file for file, half in zip(files, halves) for key in half}
            write_json(folder / "model.safetensors.index.json", dict(metadata={}, weight_map=index))
        elif name == "mqa":
            files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
            halves[0]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as in real files of that age
            for file, half in zip(files, halves):
                torch.save(half, folder / file)
            index = {key: file for file, half in zip(files, halves) for key in half}
            write_json(folder / "pytorch_model.bin.index.json", dict(metadata={}, weight_map=index))
        else:
            save_file(hf, folder / "model.safetensors", metadata=dict(format="pt"))
        if name in ("gqa", "mha"):
            shards = [w] if name == "gqa" else split(w, 2)
            folder = HERE / f"meta-{name}"
            folder.mkdir()
            write_sp(folder)
            write_json(folder / "params.json", params(n_kv_heads=n_kv_heads))
            for i, shard in enumerate(shards):
                torch.save(shard | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.0{i}.pth")
        if name == "llama3":
            path = HERE / "llama3-f16.gguf"
            write_gguf(path, w, n_kv_heads, sentencepiece_vocabulary, rope_theta=sizes["rope_theta"], context=512)
        if name == "gqa":
            write_gguf(HERE / "gqa-f16.gguf", w, n_kv_heads, sentencepiece_vocabulary)
            seen = write_gguf(HERE / "gqa-q8_0.gguf", w, n_kv_heads, bpe_vocabulary, gguf.GGMLQuantizationType.Q8_0)
            out["gqa-q8_0"] = logits(hugging_face_weights(seen, n_kv_heads), config(vocab_size, dtype, **sizes), tokens)
    save_file(out, HERE / "logits.safetensors")
    write_transformers_json()
    write_llama_cpp_json()


if __name__ == "__main__":
    main()
