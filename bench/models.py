"""Whole encoders of transformers, with their own attention and with Linformer's, in turn in one run.

    python -m bench.models --shape minilm --seq-len 512 --op fwd
    python -m bench.models --shape roberta-base --seq-len 4096 --op fwd,train

`exact` is the model as transformers makes it, with attn_implementation="sdpa"; `linformer` is its copy after
`linformerize`, and `adaptive` that with projection="adaptive". Weights are random, as time does not depend on them.
`train` is a step of AdamW on a sum of outputs.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from bench.machine import facts
from bench.measure import Stopwatch, extra_memory, percentiles, take_samples
from bench.options import check_files, size
from linformer_kernels.integrations.transformers import linformerize

MIB = 2**20
SHAPES = {
    "minilm": (BertModel, BertConfig, dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)),
    "roberta-base": (RobertaModel, RobertaConfig, {}),
}


class ModelRunner:
    """A forward pass, or a step of training."""

    def __init__(self, model: nn.Module, tokens: Tensor, op: str) -> None:
        self.model, self.tokens, self.op = model.train(op == "train"), tokens, op
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if op == "train" else None

    def prepare(self) -> None:
        return None

    def run(self, _: None) -> list[Tensor]:
        if self.optimizer is None:
            with torch.no_grad():
                return [self.model(self.tokens).last_hidden_state]
        out = self.model(self.tokens).last_hidden_state
        out.float().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [out.detach()]


def make_models(options: argparse.Namespace) -> dict[str, nn.Module]:
    model_class, config_class, sizes = SHAPES[options.shape]
    if options.layers:
        sizes = sizes | {"num_hidden_layers": options.layers}
    config = config_class(
        **sizes, max_position_embeddings=options.seq_len + 2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(0)
    exact = model_class(config).to(options.device, getattr(torch, options.dtype))
    linformer = linformerize(copy.deepcopy(exact), options.seq_len, options.proj_dim, options.sharing)
    adaptive = linformerize(copy.deepcopy(exact), proj_dim=options.proj_dim, projection="adaptive")
    return {"exact": exact, "linformer": linformer, "adaptive": adaptive}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="roberta-base")
    parser.add_argument("--op", default="fwd,train", help="fwd, train or both")
    parser.add_argument("--seq-len", type=size, default=4096, help="N")
    parser.add_argument("--proj-dim", type=size, default=128, help="K")
    parser.add_argument("--sharing", choices=["layerwise", "key_value", "headwise", "none"], default="layerwise")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, help="fewer or more layers than the shape has")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: time of the process")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the samples to this file")
    options = parser.parse_args(arguments)
    options.ops = options.op.split(",")
    if not set(options.ops) <= {"fwd", "train"}:
        parser.error(f"--op is {options.op}; wanted: fwd, train or fwd,train")
    check_files(parser, options.json)
    options.flush, options.min_time, options.cell_time, options.probe = False, 0.0, 1e9, 0.0
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    about = facts(options)
    print(", ".join(f"{name} {value}" for name, value in about.items() if value is not None))
    print(f"{options.shape}, {options.dtype}, batch {options.batch}, N = {options.seq_len}, K = {options.proj_dim}")
    tokens = torch.randint(3, 1000, (options.batch, options.seq_len), device=options.device)
    results = []
    for op in options.ops:
        runners = {name: ModelRunner(model, tokens, op) for name, model in make_models(options).items()}
        for runner in runners.values():  # an optimizer's state is made in its first step
            runner.run(runner.prepare())
        memory = {name: extra_memory(runner, options.device) for name, runner in runners.items()}
        samples = take_samples(runners, Stopwatch(options), options, lambda done: print(end=".", file=sys.stderr))
        print(file=sys.stderr)
        for name in runners:
            p20, p50, p80 = percentiles(samples[name].seconds)
            ratio = percentiles(samples["exact"].seconds)[1] / p50
            print(
                f"{op:<6} {name:<10} p20 {p20:8.3f} s  p50 {p50:8.3f} s  p80 {p80:8.3f} s  {ratio:5.2f} x as fast as "
                f"exact  extra memory {memory[name] / MIB:8.0f} MiB",
                flush=True,
            )
            results.append({"op": op, "model": name, "seconds": samples[name].seconds, "extra_bytes": memory[name]})
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(
            json.dumps({"machine": about, "options": settings, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
