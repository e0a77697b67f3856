"""The posterior gate for those who route queries between agents: numpy in, decisions out, outcomes back whenever they come."""

from moe_posterior.router.decisions import Decision, Decisions
from moe_posterior.router.embeddings import clusters_for
from moe_posterior.router.recorder import Audit, Recorder
from moe_posterior.router.router import DEFAULTS, PosteriorRouter

__all__ = ["DEFAULTS", "Audit", "Decision", "Decisions", "PosteriorRouter", "Recorder", "clusters_for"]
