"""
CUDA graphs: on a GPU a token of one row is some thousand small kernels, and to start them one by one from Python takes
several times as long as to run them. Here each half of a layer is recorded once and replayed with one call, and what a
policy asks about is read back while the GPU goes on. https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs

A policy sees layers as ever: what it calls on them is replayed where it was recorded, and else runs as usual. Recorded
are the modules and weights as they are at the first token, so that hooks do not run later, and parts put in the place
of others are not noticed: set `cache.graphs = None` for that.
"""

import torch
from torch import cuda

import parallel
from model import Step

COLUMNS = 512  # attention is recorded over whole multiples of so many columns of the cache, the last ones masked


def add_graphs(model, cache):
    """Have forward passes with this cache replay, if it lies on a CUDA device; with several processes it is untried."""
    if cache.k.is_cuda and cache.graphs is None and parallel.size == 1:
        cache.graphs = Graphs(model, cache)


class Graphs:
    """
    `cache.graphs = Graphs(model, cache)`: from then on, forward passes over one token per row replay. It stands in the
    place of the cache for what is recorded, which writes to the column that a tensor names.
    """

    def __init__(self, model, cache):
        self.model, self.cache, self.layers, self.n_columns = model, cache, [], 0
        self.capturing, self.reading, self.done = cuda.Stream(), cuda.Stream(), cuda.Event()

    def begin(self, step):
        """The layers for a forward pass of this Step, which is completed; its token goes to column `length`."""
        cache = self.cache
        for layer in self.layers:
            if layer.started:  # for the token before, and then not called for
                cache.k[layer.layer_id, :, :, self.last] = cache.v[layer.layer_id, :, :, self.last] = 0
                layer.started = False
        self.last = cache.length
        if cache.length >= self.n_columns:
            self.n_columns = min((cache.length // COLUMNS + 1) * COLUMNS, cache.max_seq_len)
            self.record(step)
        if not torch.equal(cache.pad, self.host_pad):
            self.host_pad = cache.pad.clone()
            self.pad.copy_(cache.pad)
        self.column.fill_(cache.length)
        self.start.replay()
        step.freqs_cis, step.mask = self.freqs_cis, self.mask[..., : cache.length + 1]
        return self.layers

    def where(self):
        """(freqs_cis, mask), as in Step, of the token at self.column; the mask for attention to n_columns."""
        columns = torch.arange(-(-self.n_columns // 8) * 8, device=self.pad.device)  # kernels want rows of 16 bytes
        pad = self.pad[:, None]
        seen = (columns <= self.column) & ((columns >= pad) | (self.column < pad))  # (batch, columns), as causal_mask
        mask = torch.zeros_like(seen, dtype=self.cache.k.dtype).masked_fill(~seen, -torch.inf)
        freqs_cis = self.cache.freqs_cis[(self.column - self.pad).clamp(min=0)]  # (batch, 1, head_dim / 2)
        return freqs_cis[:, None], mask[:, None, None, : self.n_columns]

    def record(self, step):
        """Record all layers, for a Step of one token per row."""
        k, batch = self.cache.k, len(self.cache.pad)
        self.column, self.host_pad = torch.tensor([self.cache.length], device=k.device), self.cache.pad.clone()
        self.pad = self.host_pad.to(k.device)
        # What is read runs beside the next layer, and must not work in the same memory
        self.pool, self.reading_pool = cuda.graph_pool_handle(), cuda.graph_pool_handle()
        self.start, (self.freqs_cis, self.mask) = self.capture(self.pool, self.where)
        step = Step(self, step.positions, None, self.freqs_cis, self.mask, trace=None, logits=None)
        x = torch.zeros(batch, 1, self.model.args.dim, dtype=k.dtype, device=k.device)
        self.capturing.wait_stream(cuda.current_stream())
        with cuda.stream(self.capturing):  # libraries make ready at a first run, which must not be recorded
            self.start.replay()
            self.model.layers[0](x, step)
            self.cache.k[0, :, :, self.cache.length] = self.cache.v[0, :, :, self.cache.length] = 0
        cuda.synchronize()
        self.layers = []
        for layer in self.model.layers:
            self.layers.append(Graphed(layer, self, step, x))
            x = self.layers[-1].temp
        for layer, after in zip(self.layers, self.layers[1:]):
            layer.after = after

    def write(self, layer_id, k, v, active):
        """KVCache.write for what is recorded: k, v (batch, n_kv_heads, 1, head_dim)."""
        all_k, all_v = self.cache.k[layer_id], self.cache.v[layer_id]
        all_k.index_copy_(2, self.column, k)
        all_v.index_copy_(2, self.column, v)
        return all_k[:, :, : self.n_columns], all_v[:, :, : self.n_columns]

    def capture(self, pool, function, *inputs):
        """(graph, output): what graph.replay() computes anew from the inputs' memory into the output's."""
        graph = cuda.CUDAGraph()
        with cuda.stream(self.capturing):
            graph.capture_begin(pool)
            try:
                output = function(*inputs)
            finally:
                graph.capture_end()
        return graph, output


class Graphed:
    """
    A layer, model.Block, for one token per row. Its states keep their memory from token to token: x, which is the temp
    of the layer before, h and temp, all (batch, 1, dim). They are overwritten by the next token, and x if add_attention
    gets another one.
    """

    def __init__(self, layer, graphs, step, x):
        self.layer, self.layer_id, self.graphs, self.x = layer, layer.layer_id, graphs, x
        self.attention_graph, self.h = graphs.capture(graphs.pool, layer.add_attention, x, step)
        self.feed_forward_graph, self.temp = graphs.capture(graphs.pool, layer.add_feed_forward, self.h, step)
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
        step.cache.written[self.layer_id, :, step.cache.length] = True
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

    def run(self, function, *states):
        if function not in self.functions:
            self.functions[function] = self.graphs.capture(self.graphs.pool, function, self, *states)
        graph, output = self.functions[function]
        graph.replay()
        return output

    def read(self, function, *states):
        reading, done = self.graphs.reading, self.graphs.done
        if function not in self.functions:
            numbers = torch.empty(len(self.h), pin_memory=cuda.is_available())  # where the GPU can write

            def compute():
                numbers.copy_(function(self, *states).view(-1), non_blocking=True)

            self.functions[function] = *self.graphs.capture(self.graphs.reading_pool, compute), numbers
        graph, _, numbers = self.functions[function]
        reading.wait_stream(cuda.current_stream())
        with cuda.stream(reading):
            graph.replay()
            done.record()
        if self.after is not None and states[-1] is self.after.x:
            self.after.attention_graph.replay()
            self.after.started = True
        done.synchronize()
        return numbers.tolist()


def owns(layer, states):
    """Whether the layer is recorded, and so are these states of it."""
    return isinstance(layer, Graphed) and all(x is layer.h or x is layer.temp for x in states)


def run(layer, function, *states):
    """function(layer, *states), of states (batch, seq, dim) of this layer; recorded where these are, the first time."""
    return layer.run(function, *states) if owns(layer, states) else function(layer, *states)


def read(layer, function, *states):
    """
    The same as a list of one number per token, for a policy to decide by. On a GPU the attention of the next layer
    begins before they are there, if the last state is what it attends to: most policies call it in any case.
    """
    return layer.read(function, *states) if owns(layer, states) else function(layer, *states).flatten().tolist()
