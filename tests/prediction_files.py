"""Predictions to evaluate, in memory and in files of every format and layout."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CLASSES, EXPERTS = 4, 3
NAMES = ["ant", "bee", "cat", "dog"]


def predictions(n: int = 300, seed: int = 0) -> dict[str, Any]:
    """Overconfident predictions of a routed model with groups."""
    draw = np.random.default_rng(seed)
    target = draw.integers(0, CLASSES, n)
    logits = draw.normal(size=(n, EXPERTS, CLASSES)) + 1.5 * (np.arange(CLASSES) == target[:, None])[:, None]
    experts = softmax(2 * logits)
    weights = draw.dirichlet(np.ones(EXPERTS), n)
    weights[np.arange(n), draw.integers(0, EXPERTS, n)] = 0
    weights /= weights.sum(1, keepdims=True)
    return {
        "probs": (weights[:, :, None] * experts).sum(1),
        "target": target,
        "groups": {"country": draw.choice(["DE", "FR"], n)},
        "routing_weights": weights,
        "expert_probs": experts,
    }


def answers(n: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and which answers were right."""
    draw = np.random.default_rng(seed)
    confidence = draw.uniform(0.3, 1, n)
    return confidence, draw.random(n) < confidence**2


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def columns(found: dict[str, Any], *, lists: bool, named: bool = False) -> dict[str, Any]:
    """The columns of a file: lists a row, or one column per class."""
    shared = {"label": [NAMES[one] for one in found["target"]] if named else found["target"].tolist()}
    shared |= {name: list(values) for name, values in found["groups"].items()}
    if lists:
        return {
            **shared,
            "probs": found["probs"].tolist(),
            "gate": found["routing_weights"].tolist(),
            "expert_probs": found["expert_probs"].tolist(),
        }
    ending = NAMES if named else [str(one) for one in range(CLASSES)]
    wide = {f"prob_{end}": found["probs"][:, k].tolist() for k, end in enumerate(ending)}
    wide |= {f"gate_{e}": found["routing_weights"][:, e].tolist() for e in range(EXPERTS)}
    for e in range(EXPERTS):
        wide |= {f"expert_{e}_{k}": found["expert_probs"][:, e, k].tolist() for k in range(CLASSES)}
    return {**shared, **wide}


def write(path: Path, content: dict[str, Any], **settings: Any) -> Path:
    """Columns as a file of the format that its name says."""
    name = path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pq.write_table(pa.table(content), path, **settings)
    elif name.endswith((".csv", ".csv.gz")):
        with (gzip.open if name.endswith(".gz") else open)(path, "wt", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(content)
            writer.writerows(zip(*content.values(), strict=True))
    elif name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if name.endswith(".gz") else open)(path, "wt") as file:
            for row in zip(*content.values(), strict=True):
                file.write(json.dumps(dict(zip(content, row, strict=True)), default=float) + "\n")
    elif name.endswith(".npz"):
        np.savez(path, **{key: np.asarray(value) for key, value in content.items()})
    else:  # the folder of a data set
        import datasets

        datasets.Dataset.from_dict(content).save_to_disk(str(path))
    return path
