"""
CUDA graphs: on a GPU a token of one row is some thousand small kernels, and to start them one by one from Python takes
several times as long as to run them. Here each half of a layer is recorded once and replayed with one call, and what a
policy asks about is read back while the GPU goes on. https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs

A policy sees layers as ever: what it calls on them is replayed where it was recorded, and else runs as usual. Modules
are recorded as they are at the first token and again after every COLUMNS tokens. In between, hooks do not run and a
part that is put in the place of another is not noticed; `graphs.USED = False` runs everything as on a CPU.
"""

import weakref
from contextlib import suppress

import torch
from torch import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from fast import parallel
from model import KVCache, Step

USED = True
COLUMNS = 512  # attention is recorded over whole multiples of so many columns of the cache, the last ones masked
ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # cuDNN's gives other bits once in some hundred tokens
MOST = 16  # functions of a policy that are recorded per layer and cache: one that is made anew for each token is not


def add_graphs(model, cache):
    """Have passes with this cache replay, if it lies on the current CUDA device; untried with several processes."""
    graphs = getattr(cache, "graphs", None)
    if graphs is not None:
        for layer in graphs.layers:
            layer.functions.clear()  # of policies that may be gone
    elif USED and cache.k.is_cuda and cache.k.device.index == cuda.current_device() and type(cache) is KVCache:
        if parallel.size == 1:
            cache.graphs = Graphs(model, cache)


class Graphs:
    """
    `cache.graphs = Graphs(model, cache)`: from then on, forward passes of that model over one token per row replay. It
    stands in the place of the cache for what is recorded, which writes to the column that a tensor names.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, weakref.proxy(cache)  # which refers to this
        self.layers, self.n_columns, self.last = [], 0, 0
        self.capturing, self.reading, self.ready, self.done = cuda.Stream(), cuda.Stream(), cuda.Event(), cuda.Event()
        self.written = cache.written.numpy()  # the same memory, in which a numpy array sets an entry sooner

    def replays(self, model, step):
        """Whether a forward pass of the model does, which this Step is for. To be asked before each one."""
        k, v, written = self.cache.k, self.cache.v, self.cache.written
        for layer in self.layers:
            if layer.started:  # for the token before, and then not called for
                rows = (~written[layer.layer_id, :, self.last]).nonzero().squeeze(1).to(k.device)
                k[layer.layer_id, rows, :, self.last] = v[layer.layer_id, rows, :, self.last] = 0
                layer.started = False
        return USED and model is self.model and step.positions.size(1) == 1

    def begin(self, step):
        """The layers for a forward pass of this Step, which is completed; its token goes to column `length`."""
        cache = self.cache
        self.last = cache.length
        if cache.length >= self.n_columns or not self.layers:
            self.n_columns = min((cache.length // COLUMNS + 1) * COLUMNS, cache.max_seq_len)
            with sdpa_kernel(ATTENTION):
                self.record(step)
        if not torch.equal(cache.pad, self.host_pad):
            self.host_pad = cache.pad.clone()
            self.pad.copy_(cache.pad)
        self.column.fill_(cache.length)
        self.start.replay()
        step.freqs_cis, step.mask = self.freqs_cis, self.seen[..., : cache.length + 1]
        return self.layers

    def where(self):
        """Of the token at self.column: freqs_cis, as in Step; the mask that is added in its attention; that as bool."""
        columns = torch.arange(-(-self.n_columns // 8) * 8, device=self.pad.device)  # kernels want rows of 16 bytes
        pad = self.pad[:, None]
        seen = (columns <= self.column) & ((columns >= pad) | (self.column < pad))  # (batch, columns), as causal_mask
        mask = torch.zeros_like(seen, dtype=self.cache.k.dtype).masked_fill(~seen, -torch.inf)
        freqs_cis = self.cache.freqs_cis[(self.column - self.pad).clamp(min=0)]  # (batch, 1, head_dim / 2)
        return freqs_cis[:, None], mask[:, None, None, : self.n_columns], seen[:, None, None]

    def record(self, step):
        """Record all layers, for a Step of one token per row."""
        self.layers = []
        k, batch = self.cache.k, len(self.cache.pad)
        self.column, self.host_pad = torch.tensor([self.cache.length], device=k.device), self.cache.pad.clone()
        self.pad = self.host_pad.to(k.device)
        # What layers, `run` and `read` work in: the second's results outlive a layer, the third is busy beside the next
        self.pool, self.run_pool, self.read_pool = [cuda.graph_pool_handle() for _ in range(3)]
        self.start, (self.freqs_cis, mask, self.seen) = self.capture(self.pool, self.capturing, self.where)
        step = Step(self, step.positions, None, self.freqs_cis, mask, trace=None, logits=None)
        x = torch.zeros(batch, 1, self.model.args.dim, dtype=k.dtype, device=k.device)
        self.capturing.wait_stream(cuda.current_stream())
        with cuda.stream(self.capturing):  # libraries make ready at a first run, which must not be recorded
            self.start.replay()
            self.model.layers[0](x, step)  # of zeros, whose keys and values are what the cache holds, zeros
        cuda.synchronize()
        layers = []
        for layer in self.model.layers:
            layers.append(Graphed(layer, self, step, x))
            x = layers[-1].temp
        for layer, after in zip(layers, layers[1:]):
            layer.after = after
        self.layers = layers  # all, or none if this was interrupted

    def write(self, layer_id, k, v, active):
        """KVCache.write for what is recorded: k, v (batch, n_kv_heads, 1, head_dim)."""
        all_k, all_v = self.cache.k[layer_id], self.cache.v[layer_id]
        all_k.index_copy_(2, self.column, k)
        all_v.index_copy_(2, self.column, v)
        return all_k[:, :, : self.n_columns], all_v[:, :, : self.n_columns]

    def capture(self, pool, stream, function, *inputs):
        """(graph, output): what graph.replay() computes anew from the inputs' memory into the output's."""
        graph = cuda.CUDAGraph()
        with cuda.stream(stream):
            graph.capture_begin(pool)
            try:
                output = function(*inputs)
            except BaseException:
                with suppress(RuntimeError):  # which would hide what went wrong
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph, output


class Graphed:
    """
    A layer, model.Block, for one token per row. Its states keep their memory from token to token: x, which is the temp
    of the layer before, h and temp, all (batch, 1, dim). They are overwritten by the next token, and x if add_attention
    gets another one.
    """

    def __init__(self, layer, graphs, step, x):
        self.layer, self.layer_id, self.graphs, self.x = layer, layer.layer_id, weakref.proxy(graphs), x
        pool, stream = graphs.pool, graphs.capturing
        self.attention_graph, self.h = graphs.capture(pool, stream, layer.add_attention, x, step)
        self.feed_forward_graph, self.temp = graphs.capture(pool, stream, layer.add_feed_forward, self.h, step)
        self.functions, self.after, self.started = {}, None, False

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __call__(self, x, step):
        return self.add_feed_forward(self.add_attention(x, step), step)

    def add_attention(self, x, step, active=None):
        if active is not None:
            return self.layer.add_attention(x, step, active)
        if x is not self.x:
            self.x.copy_(x)
        if x is not self.x or not self.started:
            self.attention_graph.replay()
        self.started = False
        self.graphs.written[self.layer_id, :, step.cache.length] = True
        return self.h

    def add_feed_forward(self, h, step, active=None):
        if active is not None and not active.all():
            return self.layer.add_feed_forward(h, step, active)
        if h is not self.h:
            self.h.copy_(h)
        self.feed_forward_graph.replay()
        if step.trace is not None:
            step.trace.record_ran(self.layer_id, active)
        return self.temp

    def cosine(self, h, temp):
        return read(self, cosine, h, temp)

    def key(self, kind, function, states):
        """What function(*states) is recorded under; None if it is not, because of other states or too many others."""
        own = dict(x=self.x, h=self.h, temp=self.temp)
        key = kind, function, *(name for state in states for name in own if own[name] is state)
        room = key in self.functions or len(self.functions) < MOST
        return key if room and len(key) == 2 + len(states) else None

    def run(self, key, function, states):
        graphs = self.graphs
        if key not in self.functions:
            function(self, *states)  # as in Graphs.record
            self.functions[key] = graphs.capture(graphs.run_pool, graphs.capturing, function, self, *states)
        graph, output = self.functions[key]
        graph.replay()
        return output

    def read(self, key, function, states):
        graphs = self.graphs
        if key not in self.functions:
            like = function(self, *states)
            numbers = torch.empty(like.shape, dtype=like.dtype, pin_memory=cuda.is_available())  # for the GPU to write

            def compute():
                numbers.copy_(function(self, *states), non_blocking=True)

            graph, _ = graphs.capture(graphs.read_pool, graphs.reading, compute)
            self.functions[key] = graph, numbers
        graph, numbers = self.functions[key]
        main = cuda.current_stream()
        graphs.ready.record(main)
        graphs.reading.wait_event(graphs.ready)
        cuda.set_stream(graphs.reading)
        graph.replay()
        cuda.set_stream(main)
        graphs.done.record(graphs.reading)
        if self.after is not None and states[-1] is self.after.x:
            self.after.attention_graph.replay()
            self.after.started = True
        graphs.done.synchronize()
        return numbers.flatten().tolist()


def cosine(layer, h, temp):
    """
    (batch, seq): the cosine of two states (batch, seq, dim), in float32 whatever their dtype, for `read`. Nine
    operations for F.cosine_similarity's fourteen: 4 % of a token of LLaMA-2-7B on an H200, if half of its layers ask.
    """
    both = torch.stack((h, temp)).float()  # (2, batch, seq, dim)
    dots = (both[:, None] * both).sum(-1)  # (2, 2, batch, seq)
    return dots[0, 1] / (dots[0, 0].sqrt() * dots[1, 1].sqrt()).clamp(min=1e-8)


def run(layer, function, *states):
    """
    function(layer, *states), of states (batch, seq, dim). If they are x, h or temp of a layer that is recorded, it is
    too, the first time: it may depend on nothing but these and tensors that stay, must not read numbers back, and must
    be the same object at every token.
    """
    key = isinstance(layer, Graphed) and layer.key("run", function, states)
    return layer.run(key, function, states) if key else function(layer, *states)


def read(layer, function, *states):
    """
    The same as a list of numbers, one per token, for a policy to decide by. On a GPU, if the last state is temp, the
    next layer's attention to it begins before the numbers are there: it must not be changed in place from then on.
    """
    key = isinstance(layer, Graphed) and layer.key("read", function, states)
    return layer.read(key, function, states) if key else function(layer, *states).flatten().tolist()
