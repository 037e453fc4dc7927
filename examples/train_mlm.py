"""Trains a byte-level masked language model twice, side by side: with Linformer attention and with exact attention.

    python examples/train_mlm.py                        the text is the standard library of this Python
    python examples/train_mlm.py --data PATH            the text is a file, or every text file in a folder
    python examples/train_mlm.py --minutes 30 --layers 4 --width 256

Both models have the same shapes, start from the same weights wherever both have them, and see the same batches with the
same masks. They take turns of a few seconds, so that a busy machine slows both alike. At the end stand the loss, the
speed and the memory of one training step of each, and a picture in build/train_mlm.png.

The loss is in bits for each masked byte. The model sees the text on both sides of it, so the figure says nothing about
a model that predicts the next byte. Nor does a training of minutes say how good Linformer attention is: so early, the
convolution over neighboring bytes does the learning, and a model with no attention at all gets as far in as many steps
(`--attention none` trains it).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from corpus import Corpus, read_corpus, unigram_bits
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from linformer_kernels import LinformerEncoderLayer, LinformerProjection

MASK, PAD, VOCABULARY = 256, 257, 258
MASKED_SHARE = 0.15  # of these 80 % turn into MASK, 10 % into any byte, 10 % stay, as in BERT
HELD_OUT_WINDOWS = 8
EVALUATE_EVERY = 10  # steps
TURN_SECONDS = 4.0
WARM_UP_STEPS = 20
PICTURE = Path("build/train_mlm.png")


@dataclass(frozen=True)
class Settings:
    seq_len: int
    proj_dim: int
    sharing: str
    layers: int
    width: int
    heads: int
    batch: int
    lr: float
    seed: int


class Batch(NamedTuple):
    inputs: Tensor  # (batch, seq_len) int64, some bytes replaced
    masked: Tensor  # (batch, seq_len) bool: the positions to predict
    targets: Tensor  # (number of masked positions,) int64
    text: Tensor | None  # (batch, seq_len) bool, False = behind the end of the text; None: there is text everywhere


def mask_windows(tokens: Tensor, generator: torch.Generator) -> Batch:
    """Chooses what to predict in (batch, seq_len) tokens, by BERT's rule."""
    text = tokens != PAD
    masked = (torch.rand(tokens.shape, generator=generator) < MASKED_SHARE) & text
    masked[:, 0] |= ~masked.any(dim=1)  # a short window may have got none
    kind = torch.rand(tokens.shape, generator=generator)
    noise = torch.randint(0, 256, tokens.shape, generator=generator)
    inputs = torch.where(masked & (kind < 0.8), MASK, tokens)
    inputs = torch.where(masked & (kind >= 0.8) & (kind < 0.9), noise, inputs)
    return Batch(inputs, masked, tokens[masked], None if text.all() else text)


def windows_at(text: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    """(len(starts), seq_len) tokens; a window over the end of the text is filled up with PAD."""
    index = starts[:, None] + torch.arange(seq_len)
    tokens = text[index.clamp(max=len(text) - 1)].long()
    return tokens.masked_fill(index >= len(text), PAD)


def random_batch(text: Tensor, settings: Settings, generator: torch.Generator) -> Batch:
    starts = torch.randint(0, max(1, len(text) - settings.seq_len + 1), (settings.batch,), generator=generator)
    return mask_windows(windows_at(text, starts, settings.seq_len), generator)


def held_out_batches(text: Tensor, settings: Settings) -> list[Batch]:
    """Up to HELD_OUT_WINDOWS windows spread over the text, with masks that never change."""
    count = min(HELD_OUT_WINDOWS, math.ceil(len(text) / settings.seq_len))
    starts = torch.linspace(0, max(0, len(text) - settings.seq_len), count).long()
    generator = torch.Generator().manual_seed(settings.seed)
    return [mask_windows(windows_at(text, some, settings.seq_len), generator) for some in starts.split(settings.batch)]


class MaskedLanguageModel(nn.Module):
    """Bytes in, for each masked position the logits of 256 bytes out.

    A convolution over a few neighboring bytes sits below the encoder layers. Attention would take long to learn where a
    position's neighbors are, and through a projection over the whole sequence hardly could.
    """

    def __init__(self, settings: Settings, attention: str) -> None:
        super().__init__()
        width = settings.width
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=PAD)
        self.position = nn.Parameter(0.02 * torch.randn(settings.seq_len, width))
        self.neighbors = nn.Conv1d(width, width, kernel_size=7, padding="same")
        self.layers = encoder_layers(settings, attention)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, batch: Batch) -> Tensor:
        mask = None if batch.text is None else ~batch.text  # True where there is none, in torch's layers and in ours
        hidden = self.embedding(batch.inputs)
        hidden = hidden + self.neighbors(hidden.transpose(1, 2)).transpose(1, 2)
        hidden = hidden + self.position[: hidden.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=mask)
        return self.head(self.norm(hidden[batch.masked]))


def encoder_layers(settings: Settings, attention: str) -> nn.ModuleList:
    shape = {
        "d_model": settings.width,
        "nhead": settings.heads,
        "dim_feedforward": 4 * settings.width,
        "dropout": 0.0,
        "activation": "gelu",
        "batch_first": True,
        "norm_first": True,
    }
    if attention == "none":
        return nn.ModuleList(FeedForwardLayer(settings.width) for _ in range(settings.layers))
    if attention == "exact":
        return nn.ModuleList(nn.TransformerEncoderLayer(**shape) for _ in range(settings.layers))
    linformer = {"seq_len": settings.seq_len, "proj_dim": settings.proj_dim, "sharing": settings.sharing}
    if settings.sharing == "layerwise":
        linformer["projection"] = LinformerProjection(settings.seq_len, settings.proj_dim, share_kv=True)
    return nn.ModuleList(LinformerEncoderLayer(**shape, **linformer) for _ in range(settings.layers))


class FeedForwardLayer(nn.Module):
    """An encoder layer without its attention: what the others must beat."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor, src_key_padding_mask: Tensor | None) -> Tensor:
        return hidden + self.feed_forward(hidden)


class Point(NamedTuple):
    """The loss after so many steps and so many seconds of training."""

    step: int
    seconds: float
    bits: float


@dataclass
class Run:
    """One model in training."""

    name: str
    model: MaskedLanguageModel
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0
    train: list[Point] = field(default_factory=list)
    held_out: list[Point] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name}: step {self.step}, {self.held_out[-1].bits:.2f} bits"


def new_run(name: str, settings: Settings) -> Run:
    torch.manual_seed(settings.seed)
    model = MaskedLanguageModel(settings, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98))
    return Run(name, model, optimizer, torch.Generator().manual_seed(settings.seed + 1))


def copy_common_weights(linformer: MaskedLanguageModel, exact: MaskedLanguageModel) -> None:
    """Gives `exact` the weights of `linformer`, which are all of its own; E and F have no place in it."""
    weights = {name: weight for name, weight in linformer.state_dict().items() if ".projection." not in name}
    for index in range(len(exact.layers)):
        attention = f"layers.{index}.self_attn"
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{attention}.{part}_proj.{kind}") for part in "qkv"]
            weights[f"{attention}.in_proj_{kind}"] = torch.cat(parts)
    exact.load_state_dict(weights)


def train_step(run: Run, batch: Batch, lr: float) -> None:
    started = time.perf_counter()
    for group in run.optimizer.param_groups:
        group["lr"] = lr * min(1.0, (run.step + 1) / WARM_UP_STEPS)
    run.optimizer.zero_grad(set_to_none=False)  # gradients stay allocated: they are not memory of the step
    loss = functional.cross_entropy(run.model(batch), batch.targets)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.step += 1
    run.seconds += time.perf_counter() - started
    run.train.append(Point(run.step, run.seconds, loss.item() / math.log(2)))


@torch.no_grad()
def evaluate(run: Run, batches: list[Batch]) -> None:
    run.model.eval()
    losses = [functional.cross_entropy(run.model(batch), batch.targets, reduction="sum").item() for batch in batches]
    run.model.train()
    bits = sum(losses) / sum(len(batch.targets) for batch in batches) / math.log(2)
    run.held_out.append(Point(run.step, run.seconds, bits))


def train(runs: list[Run], corpus: Corpus, settings: Settings, steps: int | None, minutes: float | None) -> None:
    """The runs take turns until each has made `steps` steps, or until `minutes` have passed in all."""
    held_out = held_out_batches(corpus.held_out, settings)
    last_step = math.inf if steps is None else steps
    started = time.perf_counter()
    deadline = math.inf if minutes is None else started + 60 * minutes
    for run in runs:
        evaluate(run, held_out)
    with progress_bar(len(runs), steps, minutes) as bar:
        while True:
            late = time.perf_counter() >= deadline
            waiting = [run for run in runs if run.step < (1 if late else last_step)]  # one step of each, however late
            if not waiting:
                break
            run = min(waiting, key=lambda run: run.seconds)
            turn_end = min(deadline, time.perf_counter() + TURN_SECONDS)
            while True:
                train_step(run, random_batch(corpus.train, settings, run.generator), settings.lr)
                if run.step % EVALUATE_EVERY == 0:
                    evaluate(run, held_out)
                bar.set_postfix_str("  ".join(map(str, runs)), refresh=False)
                bar.update(1 if minutes is None else min(time.perf_counter() - started, bar.total) - bar.n)
                if run.step >= last_step or time.perf_counter() >= turn_end:
                    break
    for run in runs:
        if run.held_out[-1].step < run.step:
            evaluate(run, held_out)


def progress_bar(runs: int, steps: int | None, minutes: float | None) -> tqdm:
    if minutes is None:
        return tqdm(total=steps * runs, unit="step")
    return tqdm(total=60 * minutes, bar_format="{percentage:3.0f} %|{bar:20}| {n:.0f} of {total:.0f} s{postfix}")


def memory_of_one_step(settings: Settings, attention: str) -> int | None:
    """Bytes that one training step needs at its peak beyond weights, gradients and optimizer state.

    They are the growth of the resident memory of a fresh process, so they hold whatever any library allocates. None
    where the system does not tell.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_memory_of_one_step, settings, attention).result()


def _memory_of_one_step(settings: Settings, attention: str) -> int | None:
    run = new_run(attention, settings)
    text = torch.randint(0, 256, (settings.batch * settings.seq_len,), dtype=torch.uint8)
    # A short step first: it makes the gradients and the optimizer's state, and the libraries set themselves up.
    train_step(run, mask_windows(text[: min(64, settings.seq_len)].long()[None], run.generator), settings.lr)
    batch = random_batch(text, settings, run.generator)
    before = _process_memory("VmRSS")
    train_step(run, batch, settings.lr)
    peak = _process_memory("VmHWM")
    return None if before is None or peak is None else peak - before


def _process_memory(key: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * int(fields[key].split()[0])


def report(runs: list[Run], memory: dict[str, int | None], unigram: float, settings: Settings) -> None:
    print(f"\n{'attention':<12}{'steps':>7}{'train':>8}{'held out':>10}{'tokens/s':>11}{'memory of a step':>19}")
    for run in runs:
        latest = [point.bits for point in run.train[-EVALUATE_EVERY:]]
        speed = run.step * settings.batch * settings.seq_len / run.seconds
        size = memory[run.name]
        print(
            f"{run.name:<12}{run.step:>7}{sum(latest) / len(latest):>8.3f}{run.held_out[-1].bits:>10.3f}{speed:>11,.0f}"
            + ("not known here" if size is None else f"{size / 2**20:,.0f} MiB").rjust(19)
        )
    print(f"Losses in bits for each masked byte; guessing by the frequency of bytes alone costs {unigram:.3f}.")
    if len(runs) == 2:
        first, second = ({point.step: point.bits for point in run.held_out} for run in runs)
        if step := max(first.keys() & second.keys()):
            print(f"Held out after the same {step} steps: linformer {first[step]:.3f}, exact {second[step]:.3f}.")


def draw(runs: list[Run], unigram: float, path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("No picture: matplotlib is not installed.")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, name, label in zip(axes, ("step", "seconds"), ("steps", "seconds of training"), strict=True):
        for color, run in zip(("tab:blue", "tab:orange"), runs, strict=False):
            for points, look in ((run.held_out, {"marker": "."}), (run.train, {"alpha": 0.3})):
                where = [getattr(point, name) for point in points]
                what = "held out" if points is run.held_out else "train"
                axis.plot(where, [point.bits for point in points], color=color, label=f"{run.name}, {what}", **look)
        axis.axhline(unigram, color="gray", linestyle=":", label="frequency of bytes alone")
        axis.set_xlabel(label)
    axes[0].set_ylabel("bits for each masked byte")
    axes[1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Picture: {path}")


def positive(kind: type) -> object:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a masked language model with Linformer attention and the same with exact attention."
    )
    whole, real = positive(int), positive(float)
    parser.add_argument("--data", type=Path, help="a text file or a folder (default: Python's standard library)")
    parser.add_argument("--attention", choices=["linformer", "exact", "both", "none"], default="both")
    parser.add_argument("--seq-len", type=whole, default=2048)
    parser.add_argument("--proj-dim", type=whole, default=128)
    parser.add_argument("--sharing", choices=["layerwise", "key_value", "headwise", "none"], default="layerwise")
    parser.add_argument("--layers", type=whole, default=2)
    parser.add_argument("--width", type=whole, default=128)
    parser.add_argument("--heads", type=whole, default=2)
    parser.add_argument("--batch", type=whole, default=4)
    parser.add_argument("--lr", type=real, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=whole, help="train each model for so many steps")
    parser.add_argument("--minutes", type=real, help="train for so long, both models together (default: 2)")
    parser.add_argument("--save", type=Path, help="write the trained weights and the settings to this file")
    options = parser.parse_args(arguments)
    if options.width % options.heads:
        parser.error(f"--width {options.width} is not a multiple of --heads {options.heads}")
    if options.attention in ("linformer", "both") and options.proj_dim > options.seq_len:
        parser.error(f"--proj-dim is {options.proj_dim}; wanted: no more than --seq-len, {options.seq_len}")
    if options.save and not options.save.parent.is_dir():
        parser.error(f"--save: there is no folder {options.save.parent}")
    if options.save and options.save.is_dir():
        parser.error(f"--save: {options.save} is a folder; wanted: a file")
    if options.steps is None and options.minutes is None:
        options.minutes = 2.0
    try:
        options.corpus = read_corpus(options.data)
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    corpus = options.corpus
    names = ["linformer", "exact"] if options.attention == "both" else [options.attention]
    unigram = unigram_bits(corpus)
    print(f"Text: {corpus.name}, {len(corpus.train):,} bytes to train on, {len(corpus.held_out):,} held out")
    memory = {name: memory_of_one_step(settings, name) for name in names}
    runs = [new_run(name, settings) for name in names]
    for run in runs:
        weights = sum(parameter.numel() for parameter in run.model.parameters())
        print(f"Model: attention {run.name}, {weights:,} weights")
    if len(runs) == 2:
        copy_common_weights(runs[0].model, runs[1].model)
    train(runs, corpus, settings, options.steps, options.minutes)
    report(runs, memory, unigram, settings)
    if options.save:  # before the picture, whose folder may not be writable
        models = {run.name: run.model.state_dict() for run in runs}
        torch.save({"settings": vars(settings), "models": models}, options.save)
        print(f"Weights: {options.save}")
    draw(runs, unigram, PICTURE)


if __name__ == "__main__":
    main()
