"""
The same weights in transformers and in llama.cpp, each of which is imported only when bench.py --peers uses it. Both
have `rewind` and `forward`, like bench.py's own variants.
"""

import ctypes
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import torch

import load_weights
from support import gguf_file


def make_peers(variant, prompt, columns, folder):
    """Those installed, with variant's weights. Raises ValueError if one has other logits after prompt, (batch, seq)."""
    variant.rewind()
    logits = variant.forward(prompt).cpu()
    for make, packages in (Transformers, ["transformers"]), (LlamaCpp, ["llama_cpp", "gguf"]):
        missing = [package for package in packages if not importlib.util.find_spec(package)]
        if missing:
            print(f"[{make.name} is left out: {missing[0]} is not installed]", file=sys.stderr)
        elif make is LlamaCpp and (len(prompt) > 1 or variant.cache.k.device.type != "cpu"):
            print(f"[{make.name} is left out: it runs on the CPU with --batch 1 here]", file=sys.stderr)
        elif variant.model.args.freq_factors:
            print(f"[{make.name} is left out: the scaled rotary embedding is not handed to it]", file=sys.stderr)
        else:
            peer = make(variant.model, columns, folder)
            peer.rewind()
            # Random weights of the 7B shape have 0.94 after 2,048 tokens in bfloat16, and 1.0000 in float32.
            least = 0.99 if variant.cache.k.dtype == torch.float32 else 0.9
            if torch.cosine_similarity(peer.forward(prompt).cpu(), logits).min() < least:
                raise ValueError(f"{peer.name} computes something else with these weights: no comparison")
            yield peer


class Transformers:
    """The same weights in Hugging Face's LlamaForCausalLM, called without its generate(), which adds to the time."""

    name = "transformers"

    def __init__(self, model, columns, folder):
        import transformers

        self.lib, self.version = transformers, f"transformers {transformers.__version__}"
        args = model.args
        config = transformers.LlamaConfig(
            hidden_size=args.dim, intermediate_size=args.hidden_dim, num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads, head_dim=args.head_dim,
            vocab_size=args.vocab_size, rms_norm_eps=args.norm_eps, max_position_embeddings=args.max_seq_len,
            tie_word_embeddings=args.tie_word_embeddings,
            rope_parameters=dict(rope_type="default", rope_theta=args.rope_theta),
        )  # fmt: skip
        weights, theirs = {}, {ours: name for name, ours in load_weights.HUGGING_FACE.items()}
        for name, weight in model.state_dict().items():
            layer, name = re.fullmatch(r"(layers\.\d+\.)?(.*)", name).groups()
            heads = {"attention.wq.weight": args.n_heads, "attention.wk.weight": args.n_kv_heads}.get(name)
            if heads:  # back to Hugging Face's order of rows: see load_weights.interleave
                weight = weight.view(heads, -1, 2, args.dim).transpose(1, 2).reshape(weight.shape)
            weights[f"model.{layer}{theirs[name]}" if layer else theirs[name]] = weight
        self.model = transformers.LlamaForCausalLM(config).to(weight.dtype).eval()
        self.model.load_state_dict(weights, strict=False, assign=True)
        self.model.tie_weights()
        known = inspect.signature(self.model.forward).parameters  # the cache has another name in older versions
        self.cache_name = "cache" if "cache" in known else "past_key_values"

    def rewind(self):
        self.cache = self.lib.DynamicCache()

    @torch.no_grad()
    def forward(self, tokens):
        tokens = tokens.to(self.model.device)
        cache = {self.cache_name: self.cache}
        logits = self.model(tokens, **cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        logits.argmax(-1).cpu()
        return logits


class LlamaCpp:
    """The same weights in llama.cpp, through a GGUF file in their dtype."""

    name = "llama.cpp"

    def __init__(self, model, columns, folder):
        import llama_cpp

        self.lib, self.version = llama_cpp, f"llama_cpp_python {llama_cpp.__version__}"
        self.vocab_size, path = model.args.vocab_size, Path(folder, "model.gguf")
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
    kind = gguf.GGMLQuantizationType[{torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]]
    sizes = dict(
        vocab_size=args.vocab_size, context_length=args.max_seq_len, embedding_length=args.dim,
        block_count=args.n_layers, feed_forward_length=args.hidden_dim, head_count=args.n_heads,
        head_count_kv=args.n_kv_heads, key_length=args.head_dim, value_length=args.head_dim,
        rope_dimension_count=args.head_dim, rope_freq_base=args.rope_theta, layer_norm_rms_eps=args.norm_eps,
    )
    out = gguf.GGUFWriter(path, "llama")
    out.add_tokenizer_model("none")
    for name, value in sizes.items():
        getattr(out, f"add_{name}")(value)
    theirs = {ours: name for name, ours in gguf_file.GGUF.items()}
    for name, weight in model.state_dict().items():
        layer, name = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*)\.weight", name).groups()
        name = (f"blk.{layer}." if layer else "") + theirs[name] + ".weight"
        if weight.dim() == 1:  # norms
            out.add_tensor(name, weight.float().cpu().numpy())
        else:
            out.add_tensor(name, weight.cpu().contiguous().view(torch.uint8).numpy(), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
