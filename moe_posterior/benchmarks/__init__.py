"""Routing benchmarks: environments, streams with bandit feedback, measures, tables."""

from moe_posterior.benchmarks.routing.environments import Environment, Stream, synthetic
from moe_posterior.benchmarks.routing.real import real
from moe_posterior.benchmarks.routing.stream import Trace, play, play_oracle

__all__ = ["Environment", "Stream", "Trace", "play", "play_oracle", "real", "synthetic"]
