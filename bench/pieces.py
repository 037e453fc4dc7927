"""The two halves of the operation, each alone and in turn: ours against PyTorch's, forward and backward.

    python -m bench.pieces --backend cuda,triton --timing graph

`project` is K' = E @ key and V' = F @ value, `attend` the softmax attention to given K' and V', `dE` the gradient of E
from that of K': a product for each sequence and a sum, as PyTorch does it (`by sequence`), or one product (`one`).
Rates are needed operations over time. Each answer is compared with float64 first, by the rule of the tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench import options
from bench.candidates import expanded, make_inputs, pack
from bench.check import norms
from bench.measure import GraphStopwatch, Runner, Stopwatch, percentiles, take_samples
from bench.report import duration
from linformer_kernels import project_kv, projected_attention

Call = Callable[..., Any]
KERNELS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}  # of SDPA


@dataclass(frozen=True)
class Inputs:
    """What a `Runner` runs on, of a piece with its own tensors and results."""

    tensors: tuple[Tensor, ...]
    grad_out: tuple[Tensor, ...]

    def leaves(self, exact: bool) -> list[Tensor]:
        return [tensor for tensor in self.tensors if tensor.requires_grad]


def both(product: Call, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor) -> tuple[Tensor, ...]:
    return product(proj_key, key), product(proj_value, value)


def attend(query: Tensor, key_proj: Tensor, value_proj: Tensor) -> Tensor:
    scores = query @ key_proj.transpose(-1, -2) * query.size(-1) ** -0.5
    return torch.softmax(scores, dim=-1) @ value_proj


def with_kernel(kernel: str, *tensors: Tensor) -> Tensor:
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        return scaled_dot_product_attention(*tensors)


def by_sequence(grad: Tensor, rows: Tensor) -> Tensor:
    b, h, k, d = grad.shape
    tall = rows.transpose(1, 2).reshape(b, -1, h * d)
    return torch.bmm(grad.transpose(1, 2).reshape(b, k, h * d), tall.mT).sum(0)


def one(grad: Tensor, rows: Tensor) -> Tensor:
    b, h, k, d = grad.shape
    return grad.permute(2, 0, 1, 3).reshape(k, -1) @ rows.permute(2, 0, 1, 3).reshape(-1, b * h * d).mT


def pieces(
    cell: options.Cell, settings: argparse.Namespace
) -> Iterator[tuple[str, int, Inputs, Call, dict[str, Call]]]:
    """Name, multiply-adds of its forward, inputs, the plain formula, and who computes it."""
    whole = make_inputs(cell, settings.device)
    query, key, value, proj_key, proj_value = (tensor.detach() for tensor in whole.tensors if tensor is not None)
    rows = cell.batch * cell.heads * cell.seq_len
    product = rows * cell.proj_dim * cell.head_dim
    with torch.no_grad():
        key_proj, value_proj = pack(proj_key, key).contiguous(), pack(proj_value, value).contiguous()
    trained = lambda *tensors: tuple(tensor.clone().requires_grad_() for tensor in tensors)  # noqa: E731
    plain = {"matmul": torch.matmul, "packed": pack, "bmm": expanded}
    calls: dict[str, Call] = {f"ours:{name}": partial(project_kv, backend=name) for name in settings.backend}
    calls |= {name: partial(both, product) for name, product in plain.items()}
    inputs = Inputs(trained(key, value, proj_key, proj_value), (torch.ones_like(key_proj), torch.ones_like(value_proj)))
    yield "project", 2 * product, inputs, partial(both, torch.matmul), calls
    calls = {f"ours:{name}": partial(projected_attention, backend=name) for name in settings.backend}
    calls |= {"sdpa": scaled_dot_product_attention}
    if settings.device == "cuda":
        calls |= {name: partial(with_kernel, kernel) for name, kernel in KERNELS.items()}
    yield "attend", 2 * product, Inputs(trained(query, key_proj, value_proj), (whole.grad_out,)), attend, calls
    yield "dE", product, Inputs((key_proj, key), ()), one, {"by sequence": by_sequence, "one": one}


def results(call: Call, inputs: Inputs, op: str) -> list[Tensor]:
    """The outputs, and for a backward pass the gradients."""
    out = call(*inputs.tensors)
    outs = [out] if isinstance(out, Tensor) else list(out)
    return outs if op == "fwd" else outs + list(torch.autograd.grad(outs, inputs.leaves(False), inputs.grad_out))


def in_float64(inputs: Inputs) -> Inputs:
    tensors = tuple(tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs.tensors)
    return Inputs(tensors, tuple(tensor.double() for tensor in inputs.grad_out))


def wrong(got: list[Tensor], plain: list[Tensor], want: list[Tensor]) -> str | None:
    """Why an answer is not right: it is further from float64 than twice the plain formula's, and roundings."""
    for one_got, one_plain, one_want in zip(got, plain, want, strict=True):
        unit = torch.finfo(one_got.dtype).eps + 4 * torch.finfo(torch.float32).eps
        errors, others = norms(one_got - one_want), norms(one_plain - one_want)
        for norm, size in norms(one_want).items():
            if not errors[norm] <= 2 * others[norm] + unit * size:
                return f"WRONG: {norm} error {errors[norm]:.2e}, of the plain formula {others[norm]:.2e}"
    return None


def lines(settings: argparse.Namespace) -> Iterator[str]:
    """A line for each piece, pass and K."""
    stopwatch = (GraphStopwatch if settings.timing == "graph" else Stopwatch)(settings)
    for cell in options.cells(settings):
        for name, product, inputs, formula, calls in pieces(cell, settings):
            for op in ("fwd",) if name == "dE" else ("fwd", "bwd"):
                notes, runners = {}, {}
                plain, want = results(formula, inputs, op), results(formula, in_float64(inputs), op)
                for who, call in calls.items():
                    try:
                        if (note := wrong(results(call, inputs, op), plain, want)) is None:
                            runners[who] = Runner(call, inputs, op, False)
                        else:
                            notes[who] = note
                    except (RuntimeError, ValueError) as error:
                        notes[who] = f"failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
                del plain, want
                samples = take_samples(runners, stopwatch, settings, lambda done: None) if runners else {}
                flop = 2 * product * {"fwd": 1.0, "bwd": 2.5 if name == "attend" else 2.0}[op]
                for who, found in samples.items():
                    seconds = percentiles(found.seconds)[1]
                    notes[who] = f"{duration(seconds)} ({flop / seconds / 1e12:.3g} TFLOP/s)"
                sizes = f"B={cell.batch} H={cell.heads} N={cell.seq_len} K={cell.proj_dim} D={cell.head_dim}"
                told = " | ".join(f"{who} {notes[who]}" for who in calls)
                yield f"{name} {op} {cell.dtype} {sizes}: {told}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pieces", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    split = lambda text: list(filter(None, text.split(",")))  # noqa: E731
    parser.add_argument("--backend", type=split, default=["cuda", "triton"] if gpu else ["cpu"], help="ours; may be ''")
    parser.add_argument("--dtype", type=options.names("float32 bfloat16 float16"), default=["bfloat16"])
    for flag, default in (("batch", [16]), ("heads", [8]), ("seq-len", [4096]), ("proj-dim", [128, 256])):
        parser.add_argument(f"--{flag}", type=options.sizes, default=default)
    parser.add_argument("--head-dim", type=options.sizes, default=[64])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--timing", choices=("events", "graph"), default="events", help="as in python -m bench")
    parser.add_argument("--cell-time", type=options.positive, default=2.0, help="seconds of samples a line, about")
    settings = parser.parse_args(arguments)
    if settings.timing == "graph" and settings.device != "cuda":
        parser.error("--timing graph replays CUDA graphs: add --device cuda")
    fixed = {"op": ["fwd"], "sharing": ["headwise"], "layout": ["bnhd"], "clock": "wall", "flush": False}
    vars(settings).update(fixed, min_time=0.02, probe=0.75, repeats=20)
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    bad = False
    for line in lines(parse(arguments)):
        print(line, flush=True)
        bad = bad or "WRONG" in line
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
