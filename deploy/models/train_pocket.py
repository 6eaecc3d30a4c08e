"""Makes the built-in checkpoint: train it, export it, evaluate it.

python deploy/models/train_pocket.py train --state build/pocket --minutes 60
python deploy/models/train_pocket.py export --state build/pocket --out deploy/models/pocket
python deploy/models/train_pocket.py evaluate --model deploy/models/pocket
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

import torch
from pocket_training.corpus import tokenizer_corpus
from pocket_training.evaluate import evaluate, example_list, held_out_problems, score_table
from pocket_training.export import export
from pocket_training.mixture import Mixture
from pocket_training.model import Pocket, PocketConfig
from pocket_training.mull_engine import MullEngine
from pocket_training.reference_engine import GREEDY, Sampling
from pocket_training.tokenizer import ChatTemplate, ProblemEncoder, train_tokenizer
from pocket_training.tool_use import read_agent_template
from pocket_training.training import TrainConfig, Trainer
from tokenizers import Tokenizer

DEFAULT_OUT = Path(__file__).with_name("pocket")


def load_tokenizer(state: Path, mixture: Mixture) -> Tokenizer:
    """The run's tokenizer, learnt at its first start."""
    path = state / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    state.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(tokenizer_corpus(mixture, ChatTemplate.own(), Random(0)))
    tokenizer.save(str(path))
    return tokenizer


def train(options: argparse.Namespace) -> None:
    """Train for a given time, or go on from the state that is there."""
    mixture = Mixture(read_agent_template())
    tokenizer = load_tokenizer(options.state, mixture)
    config = TrainConfig(
        minutes=options.minutes, batch_tokens=options.batch_tokens, quantise_from=options.quantise_from
    )
    Trainer(config, mixture, tokenizer, options.state / "state.pt").run()


def export_state(options: argparse.Namespace) -> None:
    """Quantise a run's weights into a checkpoint directory."""
    model = Pocket(PocketConfig())
    model.load_state_dict(torch.load(options.state / "state.pt", weights_only=True)["model"])
    export(model, Tokenizer.from_file(str(options.state / "tokenizer.json")), options.out)


def evaluate_checkpoint(options: argparse.Namespace) -> None:
    """Measure a checkpoint in mull's engine on held-out problems, greedily and with its default sampling."""
    mixture = Mixture(read_agent_template(), made_up=options.made_up)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    encoder = ProblemEncoder(tokenizer, ChatTemplate((options.model / "chat_template.jinja").read_text()))
    stop_ids = frozenset(tokenizer.encode("<|im_end|><|endoftext|>").ids)
    engine = MullEngine(options.model, stop_ids=stop_ids, num_threads=options.threads)
    dress = mixture.dress if options.in_conversation else None
    problems = held_out_problems(mixture, options.per_skill, Random(options.seed), dress)
    ways = {"greedy": GREEDY, "temperature 0.6": Sampling(seed=options.seed)}
    columns = {name: evaluate(engine, encoder, problems, sampling) for name, sampling in ways.items()}
    print(score_table(columns))
    for score in columns["greedy"]:
        for miss in score.misses[: options.show_misses]:
            print(f"--- {score.skill}: {miss.problem.messages[-1]['content']}\n{miss.written}")


def write_examples(options: argparse.Namespace) -> None:
    """Write a few held-out problems of every skill beside the checkpoint."""
    mixture = Mixture(read_agent_template(), made_up=0.0)
    encoder = ProblemEncoder(Tokenizer.from_file(str(options.model / "tokenizer.json")), ChatTemplate.own())
    problems = held_out_problems(mixture, options.per_skill, Random(options.seed))
    # the agent library's own prompt is its authors' text: it is generated where it is needed, never stored
    problems = {skill: each for skill, each in problems.items() if not skill.endswith("_agent")}
    text = json.dumps(example_list(problems, encoder), ensure_ascii=False, indent=1)
    (options.model / "examples.json").write_text(text + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch (default 1)")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train, or resume, until --minutes of training are done")
    command.add_argument("--state", type=Path, required=True, help="folder of the run's state and tokenizer")
    command.add_argument("--minutes", type=float, default=60, help="training time in all, resumes included")
    command.add_argument("--batch-tokens", type=int, default=4096, help="tokens in a step, about")
    command.add_argument(
        "--quantise-from", type=float, default=1.0, help="share of the time after which weights are fake-quantised"
    )
    command.set_defaults(run=train)
    command = commands.add_parser("export", help="write the FP8 checkpoint of a run")
    command.add_argument("--state", type=Path, required=True, help="folder of the run's state and tokenizer")
    command.add_argument("--out", type=Path, default=DEFAULT_OUT, help="checkpoint directory to replace")
    command.set_defaults(run=export_state)
    command = commands.add_parser("evaluate", help="measure a checkpoint on held-out problems")
    command.add_argument("--model", type=Path, default=DEFAULT_OUT, help="checkpoint directory")
    command.add_argument("--per-skill", type=int, default=100, help="problems of every skill")
    command.add_argument("--seed", type=int, default=7, help="which held-out problems, and the sampling's seed")
    command.add_argument("--in-conversation", action="store_true", help="some problems follow other turns")
    command.add_argument("--made-up", type=float, default=0.0, help="share of tool arguments that are on no list")
    command.add_argument("--show-misses", type=int, default=0, help="wrong answers to print, a skill")
    command.set_defaults(run=evaluate_checkpoint)
    command = commands.add_parser("examples", help="write examples.json: held-out prompts and expected answers")
    command.add_argument("--model", type=Path, default=DEFAULT_OUT, help="checkpoint directory")
    command.add_argument("--per-skill", type=int, default=8, help="problems of every skill")
    command.add_argument("--seed", type=int, default=11, help="which held-out problems")
    command.set_defaults(run=write_examples)
    return parser.parse_args()


def main() -> None:
    """Run the command that was asked for."""
    options = parse()
    torch.set_num_threads(options.threads)
    options.run(options)


if __name__ == "__main__":
    main()
