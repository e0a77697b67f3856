"""The same gates in a serving engine: ``export_routing``, and saving, loading and updating what it exports.

vLLM and SGLang call a custom routing function with keywords, ``custom_routing_function(hidden_states=..., gating_output=...,
topk=..., renormalize=...)``, and expect weights (T, k) in float32 and expert ids (T, k) in int32. We took this from the wheels of
vLLM 0.33.0 (``CustomRoutingRouter``, ``CPURouter``) and SGLang 0.5.23 (``select_experts``). Neither is a dependency; the tests make
the same calls, and call vLLM's own router where it is installed.
"""

from moe_posterior.serving.export import export_routing, load_routing, save_routing, update_routing
from moe_posterior.serving.learned import LearnedRouting
from moe_posterior.serving.routing import CustomRouting, PosteriorRouting, PriorRouting
from moe_posterior.serving.rule import HostRule, choose

__all__ = [
    "CustomRouting",
    "HostRule",
    "LearnedRouting",
    "PosteriorRouting",
    "PriorRouting",
    "choose",
    "export_routing",
    "load_routing",
    "save_routing",
    "update_routing",
]
