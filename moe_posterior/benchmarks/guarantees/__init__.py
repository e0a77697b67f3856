"""Whether the promises of :mod:`moe_posterior.guarantees` are kept on stored predictions, and what they cost."""
