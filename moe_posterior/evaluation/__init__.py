"""Reports on the predictions of any model: from Python, from files, or from a model and its data."""

from moe_posterior.evaluation.measure import evaluate
from moe_posterior.evaluation.models import evaluate_model
from moe_posterior.evaluation.result import CalibrationReport

__all__ = ["CalibrationReport", "evaluate", "evaluate_model"]
