"""Write the predictions of a text classifier from transformers to JSON lines: a list of probabilities a row, and labels that are names.

A tiny BERT learns on the spot to tell praise from complaint, so that nothing is downloaded. With a model of your own, only
``classifier`` changes. The same report from Python, without a file: ``evaluate_model(classifier, loader)``.

    pip install 'moe-posterior[evaluate,hf]'
    python from_transformers.py                # writes reviews.jsonl, some seconds
"""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, TextClassificationPipeline

PRAISE, COMPLAINT = ("lovely", "warm", "bright", "quick"), ("cold", "dull", "late", "broken")
FILLER = ("the", "a", "room", "meal", "train", "very", "was", "and", "but", "quite")


def reviews(n: int, seed: int) -> tuple[list[str], list[str]]:
    """Sentences of eight words, of which three say something; the majority of those is the label, but for one in ten that is wrong."""
    draw = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(n):
        tone = draw.random(3) < 0.5
        words = [*draw.choice(FILLER, 5), *(draw.choice(PRAISE if one else COMPLAINT) for one in tone)]
        texts.append(" ".join(draw.permutation(words)))
        labels.append("praise" if (tone.sum() >= 2) != (draw.random() < 0.1) else "complaint")
    return texts, labels


def classifier() -> TextClassificationPipeline:
    """A tiny BERT, trained on a few hundred reviews."""
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "[CLS]", *FILLER, *PRAISE, *COMPLAINT))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")
    names = {0: "complaint", 1: "praise"}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    model = BertForSequenceClassification(config)
    texts, labels = reviews(600, seed=0)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    target = torch.tensor([config.label2id[label] for label in labels])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        loss = model(**inputs, labels=target).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return TextClassificationPipeline(model=model.eval(), tokenizer=tokenizer, top_k=None)


def main() -> None:
    model = classifier()
    texts, labels = reviews(400, seed=1)
    names = [model.model.config.id2label[index] for index in (0, 1)]
    path = Path(__file__).with_name("reviews.jsonl")
    with path.open("w") as file:
        for said, label in zip(model(texts), labels, strict=True):
            scores = {one["label"]: one["score"] for one in said}
            file.write(json.dumps({"probs": [scores[name] for name in names], "label": label}) + "\n")
    print(f"{path.name}: {len(texts)} rows, class names {names}")


if __name__ == "__main__":
    main()
