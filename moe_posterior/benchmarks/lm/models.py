"""A small Mixtral on bytes, trained once per seed and cached, and its evaluation.

Dimensions: B windows, T bytes a window, V = 256.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_posterior.benchmarks.lm.data import VOCABULARY, WINDOW, Corpus, batches
from moe_posterior.errors import InvalidArgumentError, MissingDependencyError
from moe_posterior.files.reading import decoding
from moe_posterior.files.tensorfile import save_plain
from moe_posterior.files.torchfile import load_plain, read_plain_file
from moe_posterior.metrics import calibration_error

KEEP_EVERY = 100  # steps between checkpoints: the most that an interruption loses
EVALUATION_BATCH = 32
_SEED_STRIDE = 1_000_003  # steps of different seeds never draw the same windows


@dataclass(frozen=True)
class Recipe:
    """Everything but the text and the seed that determines the weights."""

    layers: int = 2
    hidden_size: int = 128
    intermediate_size: int = 256
    experts: int = 8
    top_k: int = 2
    heads: int = 4
    steps: int = 900
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.1
    balance: float = 0.01  # weight of the router's load-balancing loss, in training alone


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats a byte, and the token-level calibration error (15 bins) of the most probable byte."""

    loss: float
    ece: float
    accuracy: float


def build(recipe: Recipe, seed: int) -> nn.Module:
    """A new ``MixtralForCausalLM``, its weights drawn from the seed.

    Raises:
        MissingDependencyError: without transformers.
    """
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError as error:
        raise MissingDependencyError("transformers", "hf") from error
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        num_local_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        max_position_embeddings=WINDOW,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        router_aux_loss_coef=recipe.balance,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # transformers draws initial weights from the global generator
        model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")  # expert by expert: fastest on a CPU, and deterministic
    return model.eval()


def backward(model: nn.Module, tokens: Tensor, step: int) -> float:  # (B, T)
    """Forward and backward of a transformers model with its load-balancing loss; returns the loss without it."""
    out = model(input_ids=tokens, output_router_logits=True)
    loss = next_byte_loss(out.logits, tokens)
    (loss + cast(Any, model).config.router_aux_loss_coef * out.aux_loss).backward()
    return loss.item()


def next_byte_loss(logits: Tensor, tokens: Tensor) -> Tensor:  # (B, T, V), (B, T) -> ()
    """Cross-entropy in nats of every byte but the first, given the bytes before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(
    model: nn.Module,
    corpus: Corpus,
    recipe: Recipe,
    seed: int,
    path: Path,
    *,
    backward: Callable[[nn.Module, Tensor, int], float] = backward,
    watch: Callable[[int], Mapping[str, Any]] | None = None,
    variant: str = "base",
) -> list[dict[str, Any]]:
    """Train to the end of the recipe, resuming from the checkpoint at ``path``; a finished checkpoint is only loaded.

    Batches depend on (seed, step) alone, so an interrupted run ends bit for bit like an uninterrupted one.

    Args:
        model: changed in place; left in evaluation mode.
        corpus, recipe, seed: what the checkpoint must have been made with.
        path: the checkpoint, written every 100 steps, whole or not at all.
        backward: accumulates the gradients of one batch and returns its loss; called with the number of the step, from 0.
        watch: called at every checkpoint; its result is stored with the step and the mean training loss since the last one.
        variant: kind of model, stored in the checkpoint.

    Returns:
        The progress, one entry per checkpoint.

    Raises:
        InvalidArgumentError: the checkpoint belongs to another recipe, text, seed or variant.
    """
    identity = {**asdict(recipe), "seed": seed, "text": corpus.digest, "variant": variant}
    optimiser = torch.optim.AdamW(_groups(model, recipe), lr=recipe.learning_rate, betas=(0.9, 0.95))
    step, progress = _resume(model, optimiser, path, identity)
    losses: list[float] = []
    while step < recipe.steps:
        model.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, recipe)
        generator = torch.Generator().manual_seed(seed * _SEED_STRIDE + step)
        losses.append(backward(model, corpus.sample("train", recipe.batch_size, generator), step))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        step += 1
        if step % KEEP_EVERY == 0 or step == recipe.steps:
            model.eval()
            found = watch(step) if watch is not None else {}
            progress.append({"step": step, "train_loss": sum(losses) / len(losses), **found})
            losses = []
            _keep(path, identity, step, model, optimiser, progress)
    model.eval()
    return progress


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to a tenth.

    >>> recipe = Recipe(steps=100, warmup=10, learning_rate=1.0)
    >>> [round(learning_rate(step, recipe), 3) for step in (0, 9, 10, 55, 100)]
    [0.1, 1.0, 1.0, 0.55, 0.1]
    """
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor) -> Evaluation:  # (n, T)
    """Loss and calibration over whole windows; the gates' belief does not change."""
    total, confidence, right = 0.0, [], []
    for tokens in batches(windows, min(EVALUATION_BATCH, len(windows))):
        logits = model(input_ids=tokens).logits[:, :-1].float()  # (B, T - 1, V)
        target = tokens[:, 1:]
        log_probability = logits.log_softmax(dim=-1)
        total -= log_probability.gather(-1, target[..., None]).double().sum().item()
        best = log_probability.max(dim=-1)
        confidence.append(best.values.exp().flatten())
        right.append((best.indices == target).flatten())
    sure, correct = torch.cat(confidence), torch.cat(right)
    ece = calibration_error(sure, correct.long(), n_bins=15)
    return Evaluation(total / len(sure), float(ece), float(correct.double().mean()))


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for norms."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]


def _resume(
    model: nn.Module, optimiser: torch.optim.Optimizer, path: Path, identity: Mapping[str, Any]
) -> tuple[int, list[dict[str, Any]]]:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        return 0, []
    with decoding(path, "a checkpoint of a run", "delete it, or choose another --runs folder"):
        stored = load_plain(read_plain_file(path), path)
        differing = sorted(name for name in identity if stored["identity"].get(name) != identity[name])
    if differing:
        raise InvalidArgumentError(
            f"{path} must be a checkpoint of the same run; it differs in {', '.join(differing)}. Choose another --runs folder"
        )
    with decoding(path, "a checkpoint of this model", "delete it, or choose another --runs folder"):
        model.load_state_dict(stored["model"])
        optimiser.load_state_dict(stored["optimiser"])
        return int(stored["step"]), list(stored["progress"])


def _keep(
    path: Path,
    identity: Mapping[str, Any],
    step: int,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    progress: list[dict[str, Any]],
) -> None:
    content = {
        "identity": dict(identity),
        "step": step,
        "progress": progress,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    save_plain(path, content)
