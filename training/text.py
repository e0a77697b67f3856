"""A text encoder as a backbone: token numbers to the vector of the first token.

Dimensions: N texts, L tokens, F features.
"""

import torch
from torch import Tensor, nn

from moe_posterior.errors import InvalidArgumentError, MissingDataError, MissingDependencyError

__all__ = ["TextEncoder"]


class TextEncoder(nn.Module):
    """Any encoder of `transformers`; the last hidden vector of the first token ([CLS]) stands for the text.

    Args:
        model: name on the hub, or folder, of a model that `AutoModel` loads; the tokens must come from its own tokenizer.
        frozen: keep the weights as they are and the encoder in evaluation mode; to train heads on it, or to cache its features.

    Shapes: (N, L) integer token numbers, padded at the end -> (N, F).

    Raises:
        MissingDependencyError: `transformers` is not installed.
        MissingDataError: the model is not found.

    Source: [CLS] pooling of Devlin et al., *BERT*, 2019; DistilBERT as in *Toward Calibrated Mixture-of-Experts Under
    Distribution Shift*, 2026.
    """

    def __init__(self, model: str = "distilbert-base-uncased", frozen: bool = False) -> None:
        super().__init__()
        try:
            from transformers import AutoModel
        except ModuleNotFoundError as error:
            raise MissingDependencyError("transformers", "hf") from error
        try:
            self.encoder = AutoModel.from_pretrained(model)
        except OSError as error:
            raise MissingDataError(
                f"the encoder {model!r} is neither a folder nor to be had from the hub ({error}); name a folder that holds one, or "
                "allow downloads"
            ) from error
        config = self.encoder.config
        self.out_features: int = config.hidden_size
        self.pad_token = config.pad_token_id
        self.frozen = frozen
        if frozen:
            self.encoder.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "TextEncoder":
        """Training mode, in which a frozen encoder still drops nothing out."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, tokens: Tensor) -> Tensor:  # (N, L) -> (N, F)
        """The first token's vector.

        Raises:
            InvalidArgumentError: tokens are not integers of shape (N, L).
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise InvalidArgumentError(
                f"tokens must be integers of shape (N, L); got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        tokens = tokens.long()
        if self.pad_token is None:
            seen = torch.ones_like(tokens, dtype=torch.bool)
        else:
            seen = tokens != self.pad_token
        # Columns that are padding in every row cost time and change nothing.
        longest = max(1, int(seen.sum(dim=1).max())) if len(tokens) else tokens.shape[1]
        return self.encoder(input_ids=tokens[:, :longest], attention_mask=seen[:, :longest].long()).last_hidden_state[
            :, 0
        ]

    def extra_repr(self) -> str:
        """Shown when printed."""
        return f"out_features={self.out_features}, frozen={self.frozen}"
