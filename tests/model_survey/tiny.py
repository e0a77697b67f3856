"""A tiny model with random weights of any mixture-of-experts model type that the installed transformers knows.

For the survey and for tests: such a model has the routers, hooks and post-processing of the real one, and runs in milliseconds.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_MOE = re.compile(r"self\.experts\b|^class \w*(Router|TopKGating|MoE|Moe)\w*\(", re.MULTILINE)
EXPERTS, LAYERS, VOCABULARY, LENGTH = 8, 2, 64, 8
_HIDDEN, _HEAD, _HEADS = 32, 8, 4
# One meaning has many names: a configuration is given those of these that it has.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "tie_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "out_hidden_size", "output_dim"), _HIDDEN),
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "swa_num_key_value_heads", "n_heads"), _HEADS),
    **dict.fromkeys(("num_heads", "encoder_attention_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads", "index_n_heads"), _HEADS),
    **dict.fromkeys(("linear_num_key_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "d_kv"), _HEAD),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim", "kv_channels"), _HEAD),
    **dict.fromkeys(("swa_head_dim", "swa_v_head_dim", "global_head_dim", "cca_head_dim"), _HEAD),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "router_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "d_ff", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "shared_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), EXPERTS
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"), 2),
    **dict.fromkeys(("top_k_experts", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "num_expert_group", "expert_group"), 2),
    **dict.fromkeys(("topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("decoder_sparse_step", "encoder_sparse_step", "interleave_moe_layer_step"), 1),
    **dict.fromkeys(("moe_layer_freq", "expert_layer_period", "attn_layer_period"), 1),
    **dict.fromkeys(("expert_layer_offset", "attn_layer_offset", "first_k_dense_replace", "num_dense_layers"), 0),
    **dict.fromkeys(("moe_layer_start_index", "num_nextn_predict_layers", "decoder_layerdrop", "encoder_layerdrop"), 0),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len", "model_max_length", "sliding_window"), 64),
    **dict.fromkeys(("index_topk", "chunk_size"), 16),
    **dict.fromkeys(("pad_token_id", "decoder_start_token_id"), 0),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "expert_capacity": 64,
    "mlp_layer_types": ["sparse"] * LAYERS,
}


_MIXED = {"layer_types": ["linear_attention", "full_attention"]}  # a cache needs one layer of full attention
_INDEXED = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_PYRAMID = {"patch_sizes": [16, 6], "hidden_sizes": [32, 32], "depths": [1, 1]}
_SPECIAL_SIZES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _MIXED,
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma": {"canvas_length": LENGTH},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": _HIDDEN, "adapter_out_dim": _HIDDEN},
        "audio_config": {"adapter_input_size": _HIDDEN, "adapter_out_dim": _HIDDEN},
    },
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [24, 24], "head_dim": 128}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 24], "head_dim": 128},
    "glm4v_moe": {"text_config": {"head_dim": 128}},
    "glm4v_moe_text": {"head_dim": 128},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "layer_types": ["linear_attention", "indexed_attention"]}},
    "glm5_next_text": {"qk_rope_head_dim": 0, "layer_types": ["linear_attention", "indexed_attention"]},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "muse_spark": {"audio_config": _PYRAMID},
    "muse_spark_audio": _PYRAMID,
    "qwen3_omni_moe": {
        "thinker_config": {"vision_start_token_id": 60},
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 48}},
    },
    "doge": {"is_moe": True},
    "flint": {"mlp_only_layers": []},
    "gemma4": {"text_config": {"enable_moe_block": True}},
    "gemma4_text": {"enable_moe_block": True},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, **_MIXED},
    "inkling2": {"vision_config": {"text_hidden_size": _HIDDEN}},
    "kimi_linear": _MIXED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": _MIXED,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 60},
    "vitpose_backbone": {"part_features": 8},
    "qwen3_5_moe": {"text_config": _MIXED},
    "qwen3_5_moe_text": _MIXED,
    "qwen4_exp": {"text_config": _INDEXED},
    "qwen4_exp_text": _INDEXED,
    "zaya": {"num_experts_per_tok": 1},
}


def moe_model_types() -> list[str]:
    """Every model type of the installed transformers whose modelling code mentions experts and that has a model class of its own."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    root = Path(transformers.__file__).parent / "models"
    mentions = {path.parent.name for path in root.glob("*/modeling_*.py") if _MOE.search(path.read_text())}
    types = [kind for kind in CONFIG_MAPPING_NAMES if model_type_to_module_name(kind) in mentions]
    return sorted(kind for kind in types if model_class(kind) is not None)


def model_class(model_type: str) -> type[nn.Module] | None:
    """The class that turns text into logits where there is one, else the plainest; None for mere parts of other models."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]
    heads = ["CAUSAL_LM", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "TOKEN_CLASSIFICATION"]
    if "text_config" in config.sub_configs:
        heads = ["MULTIMODAL_LM", *heads]
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING") for head in [*heads, "BACKBONE"]]
    for mapping in [*mappings[:-1], modeling_auto.MODEL_MAPPING, mappings[-1]]:
        if config in mapping:
            found = mapping[config]
            return found[0] if isinstance(found, tuple) else found
    return None


def tiny_model(model_type: str, seed: int = 0) -> nn.Module:
    """A small model of this type in evaluation mode, its weights large enough for every part to matter in every bit."""
    kind = model_class(model_type)
    assert kind is not None, f"{model_type} is a part of other models"
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # transformers initialises from the global seed
        model = kind(tiny_config(model_type)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.requires_grad:
                parameter.normal_(std=0.15, generator=generator)
    return model


def tiny_batch(
    model: nn.Module, size: int = 2, length: int = LENGTH, padded: int = 0, seed: int = 0
) -> dict[str, Tensor]:
    """Token ids, and an attention mask whose first sequence ends with ``padded`` tokens of padding."""
    ids = torch.randint(3, VOCABULARY, (size, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length - padded :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    elif (
        "decoder_input_ids" in inspect.signature(model.forward).parameters
    ):  # a canvas, whose mask covers the prompt too
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.cat([mask, mask], dim=1)}
    return batch


def tiny_config(model_type: str) -> Any:
    """The model type's configuration with small sizes and 8 experts."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type], _SPECIAL_SIZES.get(model_type, {}))


def _shrunk(kind: Any, special: dict[str, Any]) -> Any:
    """A configuration of this class with every size it knows made small, its parts likewise."""
    default = kind()
    known = set(vars(default)) | set(kind.attribute_map)
    if "qk_nope_head_dim" in known:
        known -= {"head_dim"}  # follows from its parts
    own = {name: value for name, value in _SIZES.items() if name in known}
    parts = {}
    for name in kind.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            parts[name] = _shrunk(type(part), special.get(name, {}))
    return kind(**{**own, **special, **parts})
