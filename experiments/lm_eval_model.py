"""
Any checkpoint under any policy in EleutherAI's lm-evaluation-harness (the package lm_eval), with its tasks:

    python experiments/lm_eval_model.py --tasks mmlu,hellaswag,triviaqa --policies dense,ffnskip --skip 0.25

A table and a CSV per task, as evaluate.py makes them, with all its options but --data and --output. All tokens count as
generated (prompt_len=0): past its own warm-up a context is skipped as well, since most answers are shorter than that.
"""

import sys
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import evaluate
from tasks import TASKS, count_blocks, ratios

import common
from generate import check_finite, generate
from measuring import cut
from skip import Trace

try:
    from lm_eval.api.model import TemplateLM  # an LM that divides texts into the tokens of context and continuation
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

    def count(self, trace):
        self.counts.append(count_blocks(trace.ran, trace.token_index, self.policy, self.context))

    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        """[(log-likelihood of the continuation, whether it is greedy)] for (anything, context, continuation)."""
        owners = {}  # {text: requests}: to several answers of one token, all but that token is the same
        for i, (_, context, continuation) in enumerate(requests):
            text = tuple((context + continuation)[-self.model.args.max_seq_len - 1 : -1])
            owners.setdefault(text, []).append(i)
        answers = [None] * len(requests)
        for batch in common.progress(cut(sorted(owners, key=len), self.context.batch_size), self.context.label):
            for text, states in zip(batch, self.states(batch)):
                for i in owners[text]:
                    answers[i] = self.score(states, requests[i][2][-len(text) :])
        return answers

    def states(self, texts):
        """(batch, seq, dim): what the output head reads of texts (tuples of ids) under the policy, left-padded."""
        kept, trace, longest = [], Trace(), max(map(len, texts))
        pad = [longest - len(text) for text in texts]
        tokens = torch.tensor([[0] * n + [*text] for n, text in zip(pad, texts)])

        def keep(layers, x, step):
            kept.append(self.policy(layers, x, step))
            return kept[0]

        self.model(tokens.to(self.model.tok_embeddings.weight.device), None, keep, 0, pad, trace, last_only=True)
        self.count(trace)
        return kept[0]

    @torch.inference_mode()
    def score(self, states, ids):
        """(log-likelihood, whether greedy) of the ids that the last of the states, (seq, dim), predict."""
        ids, total, greedy = torch.tensor(ids, dtype=torch.long, device=states.device), 0.0, True
        for some, state in zip(ids.split(128), states[len(states) - len(ids) :].split(128)):
            log_p = self.model.logits(state).log_softmax(-1)  # (128, vocab): those of all ids would take gigabytes
            check_finite(log_p)
            total += log_p.gather(1, some[:, None]).double().sum().item()
            greedy = greedy and bool((log_p.argmax(-1) == some).all())
        return total, greedy

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
        if wanted.get("do_sample"):
            raise ValueError("the task wants sampled texts (do_sample), and these are greedy")
        room, trace, new, text = wanted.get("max_gen_toks", 256), Trace(), [], ""
        ids = (self.tok_encode(prompt) or [self.eot_token_id])[-max(1, self.model.args.max_seq_len - room) :]
        for token in generate(self.model, ids, room, self.policy, eos_ids=self.eos_ids, prompt_len=0, trace=trace):
            new += [token] if token not in self.eos_ids else []
            text = self.decode(new)
            ends = [text.index(stop) for stop in wanted.get("until") or [] if stop in text]
            if ends:
                text = text[: min(ends)]
                break
        self.count(trace)
        return text


def run_task(name, manager, num_fewshot, model, tokenizer, policy, data, context):
    """A task of the harness as evaluate.py runs its own: returns the columns of a row."""
    from lm_eval import simple_evaluate

    lm, options = SkipLM(model, tokenizer, policy, context), dict(limit=context.limit, num_fewshot=num_fewshot)
    results = simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=1000, **options)["results"]
    found = results.get(name) or {f"{task} {key}": metrics[key] for task, metrics in results.items() for key in metrics}
    numbers = {key.removesuffix(",none"): value for key, value in found.items() if isinstance(value, float)}
    return numbers | ratios(lm.counts)


def parse_args(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--tasks", type=evaluate.listed(str), required=True, metavar="A,B", help="`lm_eval ls tasks` lists them")
    add("--num-fewshot", type=int, metavar="N", help="solved examples in front; default: the task's own")
    add("--include-path", metavar="DIR", help="a folder with task files of yours")
    add("--results", type=Path, default=HERE / "results", metavar="DIR", help="where lm_eval_TASK.csv goes")
    options, rest = parser.parse_known_args(argv)
    options.commands = {}
    for name in options.tasks:
        TASKS[f"lm_eval_{name}"] = None  # until main knows more
        output = options.results / f"lm_eval_{name}.csv"
        data = f"num_fewshot={options.num_fewshot}"  # in the head of the CSV: a rerun goes on with the same only
        options.commands[name] = [f"lm_eval_{name}", "--data", data, "--output", str(output), *rest]
        evaluate.parse_args(options.commands[name])
    return options


def main(argv=None):
    options = parse_args(argv)
    common.import_optional("lm_eval", "lm_eval_model.py")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=options.include_path)
    for name in options.tasks:
        if not manager.match_tasks([name]):
            raise ValueError(f"no task {name}: `lm_eval ls tasks` lists them, and --include-path DIR adds yours")
        TASKS[f"lm_eval_{name}"] = lambda *_: None, partial(run_task, name, manager, options.num_fewshot)
    for name, command in options.commands.items():
        evaluate.main(command)


if __name__ == "__main__":
    common.run_command(main)
