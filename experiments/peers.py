"""
The same weights in transformers and in llama.cpp, for bench.py --peers. Neither is a requirement: each is imported only
when it is used. Both have `rewind`, and `forward`, which gives the last token's logits (batch, vocab) of tokens
(batch, seq), and finds the likeliest, as bench.py's own variants do.
"""

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

import torch

import load_weights


def make_peers(model, batch, columns, folder):
    """transformers and llama.cpp with our weights, those of them that are installed and can."""
    cpu = model.tok_embeddings.weight.device.type == "cpu" and batch == 1
    for make, packages, can in (Transformers, ["transformers"], True), (LlamaCpp, ["llama_cpp", "gguf"], cpu):
        missing = [package for package in packages if not importlib.util.find_spec(package)]
        if missing or not can:
            why = f"{missing[0]} is not installed" if missing else "it runs on the CPU with --batch 1 here"
            print(f"[{make.name} is left out: {why}]", file=sys.stderr)
        else:
            yield make(model, columns, folder)


class Transformers:
    """The same weights in Hugging Face's LlamaForCausalLM, called without its generate(), which adds to the time."""

    name, package = "transformers", "transformers"

    def __init__(self, model, columns, folder):
        from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

        args, self.make_cache = model.args, DynamicCache
        config = LlamaConfig(
            hidden_size=args.dim, intermediate_size=args.hidden_dim, num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads, head_dim=args.head_dim,
            vocab_size=args.vocab_size, rms_norm_eps=args.norm_eps, max_position_embeddings=args.max_seq_len,
            tie_word_embeddings=args.tie_word_embeddings,
            rope_parameters=dict(rope_type="default", rope_theta=args.rope_theta),
        )  # fmt: skip
        weights = {}
        for name, weight in model.state_dict().items():
            layer, name = re.fullmatch(r"(layers\.\d+\.)?(.*)", name).groups()
            heads = {"attention.wq.weight": args.n_heads, "attention.wk.weight": args.n_kv_heads}.get(name)
            if heads:  # back to Hugging Face's order of rows: see load_weights.interleave
                weight = weight.view(heads, -1, 2, args.dim).transpose(1, 2).reshape(weight.shape)
            name = next(theirs for theirs, ours in load_weights.HUGGING_FACE.items() if ours == name)
            weights[f"model.{layer}{name}" if layer else name] = weight
        self.model = LlamaForCausalLM(config).to(weight.dtype).eval()
        self.model.load_state_dict(weights, strict=False, assign=True)
        self.model.tie_weights()

    def rewind(self):
        self.cache = self.make_cache()

    @torch.no_grad()
    def forward(self, tokens):
        tokens = tokens.to(self.model.device)
        logits = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        logits.argmax(-1).cpu()
        return logits


class LlamaCpp:
    """The same weights in llama.cpp, through a GGUF file in their dtype."""

    name, package = "llama.cpp", "llama_cpp_python"

    def __init__(self, model, columns, folder):
        import llama_cpp

        self.lib, self.vocab_size, path = llama_cpp, model.args.vocab_size, Path(folder, "model.gguf")
        write_gguf(model, path)
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds no reference
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = columns, columns, 512
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = self.model and llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError("llama.cpp does not open these weights")

    def rewind(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def forward(self, tokens):
        ids = (self.lib.llama_token * tokens.numel())(*tokens.flatten().tolist())
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, len(ids))):
            raise ValueError("llama.cpp failed")
        logits = ctypes.addressof(self.lib.llama_get_logits_ith(self.context, -1).contents)
        logits = torch.frombuffer((ctypes.c_float * self.vocab_size).from_address(logits), dtype=torch.float32)[None]
        logits.argmax(-1)
        return logits


def write_gguf(model, path):
    """The model, without a tokenizer, as a GGUF file in its own dtype."""
    import gguf

    args, dtype = model.args, model.tok_embeddings.weight.dtype
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    out = gguf.GGUFWriter(path, "llama")
    out.add_tokenizer_model("none")
    out.add_vocab_size(args.vocab_size)
    out.add_context_length(args.max_seq_len)
    out.add_embedding_length(args.dim)
    out.add_block_count(args.n_layers)
    out.add_feed_forward_length(args.hidden_dim)
    out.add_head_count(args.n_heads)
    out.add_head_count_kv(args.n_kv_heads)
    out.add_key_length(args.head_dim)
    out.add_value_length(args.head_dim)
    out.add_rope_dimension_count(args.head_dim)
    out.add_rope_freq_base(args.rope_theta)
    out.add_layer_norm_rms_eps(args.norm_eps)
    names = {ours: theirs for theirs, ours in load_weights.GGUF.items()}
    for name, weight in model.state_dict().items():
        layer, name = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*)\.weight", name).groups()
        name = (f"blk.{layer}." if layer else "") + names[name] + ".weight"
        weight = weight.cpu().contiguous()
        if weight.dim() == 1:  # norms
            out.add_tensor(name, weight.float().numpy())
        else:
            data = weight.view(torch.uint8).numpy() if kind == "BF16" else weight.numpy()
            out.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
