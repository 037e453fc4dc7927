"""A trained encoder goes over to Linformer attention: the original teaches its converted copy.

    python examples/convert.py --model roberta-base --data PATH --seq-len 512 --proj-dim 128 --output runs/converted
    python examples/finetune.py --task imdb --data aclImdb --checkpoint runs/converted --output runs/imdb

    python examples/finetune.py --task imdb --data aclImdb --checkpoint roberta --output runs/teacher
    python examples/convert.py --task imdb --data aclImdb --model runs/teacher --projection adaptive --output ...

The first way is on text without labels, the second on a task: its teacher is fine-tuned already, and the loss is the
task's plus the mean square of what the copy's hidden states, of every layer, lack of the teacher's, as in CALD
(arXiv 2410.06846).

The model is a folder or a name that transformers' from_pretrained takes, with its tokenizer. The copy starts with the
original's weights. On text it learns to give its hidden states; the word embeddings stay as they are. Each batch is cut
to a random length from --shortest to --seq-len, so that E learns short texts too. A tenth of the text (see corpus.py)
is held out: what is printed is the cosine similarity of hidden states there, of each token and of their mean over a
sequence. With --repeat-positions a model that was trained on 512 tokens reads more: original and copy get its table of
positions several times over, as Longformer did (Beltagy et al., 2020, section 5). The output loads with
`linformer_kernels.integrations.transformers.load`. `torchrun`, `--resume` and `--record FILE` work as in
pretrain_mlm.py.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from checkpoints import WholeCheckpoints
from corpus import read_corpus
from encoder import add_projection
from finetune import Encoded, Pad, accuracy_and_f1, characters, subset
from pretrain_mlm import Blocks
from recording import Recorder, arguments, machine
from tasks import TASKS, Task, read_task
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import Subset
from training import (
    MAIN_PROCESS,
    REFUSED,
    add_options,
    add_resume,
    check_options,
    check_resumed,
    count_in_words,
    count_weights,
    longest_sequence,
    refusals,
    run,
    train,
    trainer_arguments,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    set_seed,
)

from linformer_kernels.integrations.transformers import linformerize

NOT_RECORDED = ("read", "tokenizer", "teacher", "student")


class Teaching(WholeCheckpoints):
    """The loss is one minus the cosine similarity of the student's and the teacher's hidden states."""

    def __init__(self, teacher: PreTrainedModel, shortest: int, special: int, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = teacher.to(self.args.device).eval()
        self.shortest, self.special = shortest, special

    def cosines(self, model: nn.Module, ids: Tensor) -> Tensor:
        """(B, 2): mean over the tokens of a sequence, and of the sequence's mean."""
        with torch.no_grad():
            want = self.teacher(ids).last_hidden_state.float()
        got = model(ids).last_hidden_state.float()
        token = cosine_similarity(got, want, dim=-1).mean(1)
        return torch.stack((token, cosine_similarity(got.mean(1), want.mean(1), dim=-1)), 1)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Of a batch cut to a random length; the special tokens at the end of a sequence stay there."""
        ids = inputs["input_ids"]
        length = int(torch.randint(self.shortest, ids.size(1) + 1, ()))
        end = ids.size(1) - self.special
        ids = torch.cat((ids[:, : length - self.special], ids[:, end:]), 1)
        return 1 - self.cosines(model, ids)[:, 0].mean()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad(), self.compute_loss_context_manager():
            cosines = self.cosines(model, self._prepare_inputs(inputs)["input_ids"])
        return 1 - cosines[:, 0].mean(), cosines, cosines  # the last as labels, without which there are no metrics


class TeachingTask(WholeCheckpoints):
    """The loss is the task's, plus the mean square of the difference to the teacher's hidden states in every layer."""

    def __init__(self, teacher: PreTrainedModel, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """In evaluation the loss of the task alone."""
        got = model(**inputs, output_hidden_states=model.training)
        loss = got.loss
        if model.training:
            with torch.no_grad():
                want = self.teacher(**inputs, output_hidden_states=True).hidden_states
            takes_part = inputs["attention_mask"].bool()
            # The first are the embeddings, which start alike.
            squares = [
                (ours - theirs)[takes_part].float().square().mean()
                for ours, theirs in zip(got.hidden_states[1:], want[1:], strict=True)
            ]
            loss = loss + torch.stack(squares).mean()
        return (loss, {"loss": loss, "logits": got.logits}) if return_outputs else loss


def means(prediction: EvalPrediction) -> dict[str, float]:
    return dict(zip(("token_cosine", "sentence_cosine"), prediction.predictions.mean(0).tolist(), strict=True))


def lengthen(model: PreTrainedModel, tokens: int) -> PreTrainedModel:
    """A model like this one that takes so many tokens, with the table of positions repeated."""
    longest = longest_sequence(model.config.to_dict())
    names = [name for name, _ in model.named_parameters() if name.endswith("position_embeddings.weight")]
    if len(names) != 1:
        raise ValueError(f"--repeat-positions: the model has {len(names)} tables of positions; wanted: one")
    config, weights = copy.deepcopy(model.config), model.state_dict()
    table = weights[names[0]]
    first = len(table) - longest  # rows of RoBERTa's that are for padding
    weights[names[0]] = torch.cat((table[:first], table[first + torch.arange(tokens) % longest]))
    config.max_position_embeddings = first + tokens
    longer = type(model)(config)
    longer.load_state_dict(weights)
    return longer.eval()


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Dropout would be noise on what is compared. The config, which the output has too, keeps its rates."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def parse_arguments(command_line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Converts a trained encoder to Linformer attention.")
    parser.add_argument("--model", type=Path, required=True, help="a folder, or a name, for from_pretrained")
    parser.add_argument("--task", choices=TASKS, help="teach on a task, for which the model is fine-tuned already")
    parser.add_argument("--data", type=Path, required=True, help="a text file or a folder of them; the data of --task")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the final model")
    add_projection(parser)
    parser.add_argument("--repeat-positions", action="store_true", help="for more tokens than the model was made for")
    parser.add_argument("--shortest", type=int, help="tokens of the shortest batch; default: an eighth of N")
    parser.add_argument("--init", choices=["gaussian", "mean", "identity"], help="default: mean, of matrices")
    parser.add_argument("--length-norm", action="store_true", help="of matrices: E times the root of N over the length")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--evaluation-sequences", type=int, default=64, help="of text; with --task, of its examples")
    add_options(parser, batch=8, lr=2e-4, warmup="a twentieth", every="a tenth")
    add_resume(parser)
    options = parser.parse_args(command_line)
    check_options(parser, options, "seq_len", "shortest", "proj_dim", "steps", "evaluation_sequences")
    if options.init is None:
        options.init = "mean" if options.projection in ("learned", "fixed") else "gaussian"
    if options.shortest is None:
        options.shortest = min(options.seq_len, max(8, options.seq_len // 8))
    if options.shortest > options.seq_len:
        parser.error(f"--shortest is {options.shortest}; wanted: at most --seq-len, {options.seq_len}")
    try:
        options.read = read_task(options.task, options.data) if options.task else read_corpus(options.data)
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    try:
        options.tokenizer, options.teacher, options.student = models(options)
    except REFUSED as error:
        parser.error(f"--model: {error}")
    check_resumed(parser, options, arguments(options, *NOT_RECORDED))
    return options


def models(options: argparse.Namespace) -> tuple[Any, PreTrainedModel, PreTrainedModel]:
    """The tokenizer, the original, and its converted copy."""
    tokenizer = AutoTokenizer.from_pretrained(str(options.model))
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a config alone
        raise ValueError(f"{options.model} has no tokenizer; wanted: its files beside the model's")
    if getattr(AutoConfig.from_pretrained(str(options.model)), "linformer", None) is not None:
        raise ValueError(f"{options.model} has Linformer attention already; wanted: the model that it was made of")
    model_class = AutoModelForSequenceClassification if options.task else AutoModel
    if options.task and not _classifies(options):
        raise ValueError(f"{options.model} is not fine-tuned for {options.task}; wanted: the --output of finetune.py")
    teacher = model_class.from_pretrained(str(options.model), dtype=torch.float32)  # --precision is of the steps
    longest = longest_sequence(teacher.config.to_dict())
    if options.seq_len > longest:
        if not options.repeat_positions:
            raise ValueError(
                f"{options.model} takes at most {longest} tokens, --seq-len is {options.seq_len}; wanted: no more, or "
                "--repeat-positions"
            )
        teacher = lengthen(teacher, options.seq_len)
        tokenizer.model_max_length = options.seq_len
    set_seed(options.seed)
    student = without_dropout(copy.deepcopy(teacher))
    kind = {"init": options.init, "projection": options.projection, "length_norm": options.length_norm}
    linformerize(student, options.seq_len, options.proj_dim, options.sharing, **kind)
    student.get_input_embeddings().requires_grad_(False)
    return tokenizer, teacher, student


def _classifies(options: argparse.Namespace) -> bool:
    """Whether the model says that its labels are those of the task, as finetune.py writes them."""
    return AutoConfig.from_pretrained(str(options.model)).id2label == dict(enumerate(options.read.labels))


def _of_text(options: argparse.Namespace) -> tuple[int, Any, Any]:
    """How many special tokens end a sequence, the text to train on, and what is held out of it."""
    before, *after = options.tokenizer("")["input_ids"]  # [CLS] and [SEP], or what the model has for them
    texts = options.read.texts()
    blocks, held_out = (Blocks(text, options.tokenizer, options.seq_len, [before], after) for text in texts)
    if MAIN_PROCESS:
        sizes = f"{blocks.ids.numel():,} tokens to train on, {held_out.ids.numel():,} held out"
        print(f"Text: {options.read.name}, {sizes}")
    return len(after), blocks, Subset(held_out, range(min(options.evaluation_sequences, len(held_out))))


def _of_task(options: argparse.Namespace) -> tuple[int, Any, Any]:
    """The same of a task, whose batches are not cut."""
    task: Task = options.read
    count = min(options.evaluation_sequences, len(task.evaluation))
    evaluation = sorted(subset(task.evaluation, count, seed=0), key=characters)  # batches hold little padding
    segments = getattr(options.teacher.config, "type_vocab_size", 1) > 1
    encoded = [Encoded(part, options.tokenizer, options.seq_len, segments) for part in (task.train, evaluation)]
    if MAIN_PROCESS:
        print(f"Task: {options.task}, {len(task.train):,} examples to train on, {count:,} for evaluation")
    return 0, *encoded


def main(command_line: list[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(command_line)
    tokenizer, student = options.tokenizer, options.student
    with refusals():
        special, train_data, held_out = _of_task(options) if options.task else _of_text(options)
    weights = count_weights(student)
    if MAIN_PROCESS:
        print(f"Model: {options.model}, {count_in_words(weights)}")
    size = {"train_examples": len(train_data)} if options.task else {"tokens": train_data.ids.numel()}
    record = {"arguments": arguments(options, *NOT_RECORDED), **size, **weights, "machine": machine()}
    recorder = Recorder(record, options.record)
    common: dict[str, Any] = {
        "model": student,
        "args": trainer_arguments(
            options,
            every=max(1, options.steps // 10),
            warmup=options.steps // 20,
            max_steps=options.steps,
            eval_on_start=True,
            weight_decay=0.0,
            ddp_find_unused_parameters=True,  # a pooler has no gradient
        ),
        "train_dataset": train_data,
        "eval_dataset": held_out,
        "processing_class": tokenizer,
        "callbacks": [recorder],
    }
    if options.task:
        pad = Pad(tokenizer.pad_token_id)
        trainer = TeachingTask(options.teacher, data_collator=pad, compute_metrics=accuracy_and_f1, **common)
    else:
        trainer = Teaching(options.teacher, options.shortest, special, compute_metrics=means, **common)
    train(trainer, options)
    if MAIN_PROCESS:
        first, last = record["held_out"][0], record["held_out"][-1]
        titles = {
            "token_cosine": "Cosine similarity with the original, each token",
            "sentence_cosine": "Cosine similarity with the original, mean of a sequence",
            "accuracy": "Accuracy",
        }
        for name in titles.keys() & last.keys():
            print(f"{titles[name]}: {first[name]:.3f} before, {last[name]:.3f} after")
        print(f"{recorder.seconds / 60:.1f} minutes of steps. Saved: {options.output}")
    return record


if __name__ == "__main__":
    run(main)
