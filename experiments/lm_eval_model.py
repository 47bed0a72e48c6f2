"""
Any checkpoint under any policy in EleutherAI's lm-evaluation-harness (the package lm_eval), with its tasks:

    python experiments/lm_eval_model.py --tasks mmlu,hellaswag,triviaqa --policies dense,ffnskip --skip 0.25

A table and a CSV per task, as evaluate.py makes them, with all its options but --data and --output. Table 5 is
--tasks mmlu_stem,mmlu_humanities,mmlu_social_sciences,mmlu_other. All tokens count as generated (prompt_len=0): past
its own warm-up a context is skipped as well, since most answers are shorter than that.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import support  # noqa: I001, F401 (before PyTorch: Ctrl-C)
import torch
import evaluate
from tasks import TASKS, count_blocks, means, ratios

from generate import generate
from support import common
from support.measuring import cut
from support.tracing import Trace

try:
    from lm_eval.api.model import TemplateLM  # an LM that divides texts into the tokens of context and continuation
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:  # main says so
    TemplateLM = object


class SkipLM(TemplateLM):
    """A model under a policy, as the harness calls it. counts: what it skipped, a tasks.count_blocks per pass."""

    eot_token_id = None  # not the property of TemplateLM

    def __init__(self, model, tokenizer, policy, context):
        super().__init__()
        self.model, self.policy, self.context, self.counts = model, policy, context, []
        self.encode, self.decode, self.eos_ids = tokenizer.encode, tokenizer.decode, tokenizer.eos_ids
        self.eot_token_id = min(self.eos_ids) if tokenizer.bos_id is None else tokenizer.bos_id  # begins a text

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.encode(string, bos=add_special_tokens)

    def tell_cut(self, n):
        """Say once that texts are n tokens too long, if they are: the harness cuts off the beginning of such a text."""
        if n > 0:
            length = self.model.args.max_seq_len
            common.note(f"[{self.context.label}: texts longer than the context of {length} lose their beginning]")

    def count(self, trace):
        self.counts.append(count_blocks(trace.read, trace.token_index, self.policy, self.context))

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """[(log-likelihood of the continuation, whether it is greedy)] for (anything, context, continuation)."""
        owners = {}  # {text: requests}: to several answers of one token, all but that token is the same
        for i, (_, context, continuation) in enumerate(requests):
            whole = context + continuation
            text = tuple(whole[-self.model.args.max_seq_len - 1 : -1])
            self.tell_cut(len(whole) - len(text) - 1)
            owners.setdefault(text, []).append(i)
        answers, device = [None] * len(requests), self.model.tok_embeddings.weight.device
        for texts in common.progress(cut(sorted(owners, key=len), self.context.batch_size), self.context.label):
            pad = [len(texts[-1]) - len(text) for text in texts]
            tokens = torch.tensor([[0] * n + [*text] for n, text in zip(pad, texts)], device=device)
            for text, state in zip(texts, self.states(tokens, pad)):
                for i in owners[text]:
                    ids = torch.tensor(requests[i][2][-len(text) :], device=device)
                    log_p = self.model.logits(state[-len(ids) :]).log_softmax(-1)  # (continuation, vocab)
                    common.check_finite(log_p)
                    likelihood = log_p.gather(1, ids[:, None]).cpu().double().sum().item()
                    answers[i] = likelihood, bool((log_p.argmax(-1) == ids).all())
        return answers

    def states(self, tokens, pad):
        """(batch, seq, dim): what the head reads of tokens (batch, seq), since logits of whole texts are large."""
        trace, states = Trace(), []

        def keep(layers, x, step):
            states.append(self.policy(layers, x, step))
            return states[0]

        self.model(tokens, policy=keep, pad=pad, trace=trace, last_only=True)
        self.count(trace)
        return states[0]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihoods of whole texts, in windows of max_seq_len that each begin with a warm-up."""
        windows, totals = [], [0.0] * len(requests)
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.eot_token_id, self.model.args.max_seq_len, 1):
                windows.append((i, *make_disjoint_window(window)))
        for (i, *_), (total, _) in zip(windows, self._loglikelihood_tokens(windows)):
            totals[i] += total
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        return [self.write(*request.args) for request in common.progress(requests, self.context.label)]

    def write(self, prompt, wanted):
        """The greedy continuation of a text up to the first of its stop texts. Raises ValueError for a sampled one."""
        wanted = normalize_gen_kwargs(wanted)  # which knows several names of a limit, and one stop text or a list
        if wanted["do_sample"]:
            raise ValueError("the task wants sampled texts (do_sample or a temperature), and these are greedy")
        room, trace, new, text = wanted["max_gen_toks"], Trace(), [], ""
        longest = self.model.args.max_seq_len - room
        if longest < 1:
            raise ValueError(f"the task wants {room} new tokens, and the model's max_seq_len is {longest + room}")
        ids = self.tok_encode(prompt) or [self.eot_token_id]
        self.tell_cut(len(ids) - longest)
        ids = ids[-longest:]
        for token in generate(self.model, ids, room, self.policy, eos_ids=self.eos_ids, prompt_len=0, trace=trace):
            if token not in self.eos_ids:
                new.append(token)
            whole = text = self.decode(new)
            for stop in filter(None, wanted["until"]):
                text = text.split(stop)[0]
            if text != whole:
                break
        self.count(trace)
        return text


def run_task(name, manager, num_fewshot, model, tokenizer, policy, data, context):
    """A task of the harness as evaluate.py runs its own: returns the columns of a row."""
    from lm_eval import simple_evaluate

    lm, options = SkipLM(model, tokenizer, policy, context), dict(limit=context.limit, num_fewshot=num_fewshot)
    out = simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=1000, **options)
    found, row, items = out["results"].get(name), {}, []
    if found is None:  # a group without a mean of its own: the columns of all its tasks
        found = {f"{task} {key}": each[key] for task, each in out["results"].items() for key in each}
    for key, value in found.items():
        if isinstance(value, float):
            row[key.removesuffix(",none")] = value
    for samples in out["samples"].values():
        items += samples
    metric, kind = items[0]["metrics"][0], items[0]["filter"]
    scores = [item[metric] for item in items if item["filter"] == kind]
    if all(isinstance(score, (int, float)) for score in scores):  # a mean over items: interval and paired difference
        row = means(context, **{metric: scores}) | row
    return row | ratios(lm.counts)


def parse_args(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--tasks", type=evaluate.listed(str), required=True, metavar="A,B", help="`lm_eval ls tasks` lists them")
    add("--num-fewshot", type=int, metavar="N", help="solved examples in front; default: the task's own")
    add("--include-path", metavar="DIR", help="a folder with task files of yours")
    add("--results", type=Path, default=Path("out"), metavar="DIR", help="where lm_eval_TASK.csv goes (default out)")
    options, options.others = parser.parse_known_args(argv)
    others = evaluate.parse_args(["perplexity", *options.others])  # exits where it does not understand
    for flag in "chat", "decode":
        if getattr(others, flag):
            parser.error(f"--{flag} is not for tasks of the harness")
    return options


def main(argv=None):
    options = parse_args(argv)
    common.import_optional("lm_eval", "lm_eval_model.py", "make eval")
    from lm_eval.tasks import TaskManager

    manager, shots = TaskManager(include_path=options.include_path), options.num_fewshot
    for name in options.tasks:
        if not manager.match_tasks([name]):
            raise ValueError(f"no task {name}: `lm_eval ls tasks` lists them, and --include-path DIR adds yours")
    for name in options.tasks:
        task, output = f"lm_eval_{name}", str(options.results / f"lm_eval_{name}.csv")
        TASKS[task] = lambda *_: None, partial(run_task, name, manager, shots)
        data = f"num_fewshot={shots}"  # in the head of the CSV, with which only the same command goes on
        if options.include_path:
            for file in sorted(Path(options.include_path).rglob("*.[yp]*")):  # .yaml and .py: what tasks are made of
                data += f" {file.name}@{common.checksum(file)}"
        evaluate.main([task, "--data", data, "--output", output, *options.others])


if __name__ == "__main__":
    common.run_command(main)
