"""Megatron-LM's args, as they lie in its checkpoints, to a ModelConfig and back."""

import argparse
from pathlib import Path
from typing import Any

from megatron_distkv.config.base import parse_config
from megatron_distkv.config.model import MixtureConfig, ModelConfig
from megatron_distkv.errors import CheckpointError
from megatron_distkv.model.families import Family, family_named, family_of

# What else than this changes the computation: key, the only value that we compute, why in words.
_ONLY = (
    ("normalization", "RMSNorm"),
    ("swiglu", True),
    ("add_bias_linear", False),
    ("rotary_interleaved", False),
    ("apply_layernorm_1p", False),
    ("multi_latent_attention", False),
    ("moe_shared_expert_intermediate_size", None),
    ("moe_router_score_function", "softmax"),
    ("moe_router_enable_expert_bias", False),
    ("moe_router_topk_scaling_factor", None),
    ("moe_router_num_groups", None),
    ("moe_layer_freq", 1),
    ("qk_l2_norm", False),
)
_POSITIONS = ("rope", "none")


def read_args(args: dict[str, Any], where: str) -> ModelConfig:
    """The model's shape; raises CheckpointError when it is none that we can build."""
    args = _with_family(args)
    name = args.get("distkv_family")
    family = family_named(str(name), where) if name else None
    for key, plain in _ONLY:
        wanted = plain if family is None else family.parts.megatron_args.get(key, plain)
        found = args.get(key, wanted)
        if found != wanted and not (wanted in (None, False) and not found):
            raise CheckpointError(f"{where}: the model has {key}={found!r}; only {wanted!r} is supported yet")
    position = args.get("position_embedding_type", "rope")
    if position not in _POSITIONS:
        raise CheckpointError(
            f"{where}: position_embedding_type {position!r} is not supported yet; only rope and none are"
        )
    heads = args.get("num_attention_heads")
    is_grouped = args.get("group_query_attention", True)
    window = args.get("window_size")
    values = {
        "num_layers": args.get("num_layers"),
        "hidden_size": args.get("hidden_size"),
        "ffn_hidden_size": args.get("ffn_hidden_size"),
        "num_attention_heads": heads,
        "num_kv_heads": (args.get("num_query_groups") if is_grouped else None) or heads,
        "head_dim": args.get("kv_channels"),
        "vocab_size": args.get("vocab_size") or args.get("padded_vocab_size"),
        "rotary_percent": 0.0 if position == "none" else args.get("rotary_percent", 1.0),
        "rotary_base": args.get("rotary_base", 10000),
        "rope_scaling": _rope_scaling(args),
        "qkv_bias": bool(args.get("add_qkv_bias")),
        "qk_layernorm": bool(args.get("qk_layernorm")),
        "mixture": _mixture(args),
        "sliding_window": None if not window else window[0] + 1,
        "windowed_layers": _windowed_layers(args) if window else None,
        **({} if family is None else _family(family, args, where)),
        "norm_epsilon": args.get("norm_epsilon", 1e-5),
        "tie_embeddings": not args.get("untie_embeddings_and_output_weights", False),
        "max_context_tokens": args.get("max_position_embeddings"),
        "dtype": "bf16" if args.get("bf16") else "fp32",
        "eos_token_ids": tuple(args.get("eos_token_ids", ())),
    }
    return parse_config(ModelConfig, values, where)


def _family(family: Family, args: dict[str, Any], where: str) -> dict[str, Any]:
    options = parse_config(family.options, args.get("distkv_family_options") or {}, where)
    return {"family": family.name, "family_options": options.model_dump()}


def _with_family(args: dict[str, Any]) -> dict[str, Any]:
    """Our first checkpoints of Gemma had a key of their own for its options."""
    if not args.get("distkv_gemma"):
        return args
    name = "gemma3_text" if args.get("qk_layernorm") else "gemma2"
    return {**args, "distkv_family": name, "distkv_family_options": args["distkv_gemma"]}


def _mixture(args: dict[str, Any]) -> dict[str, Any] | None:
    if not args.get("num_experts"):
        return None
    return {
        "num_experts": args["num_experts"],
        "experts_per_token": args.get("moe_router_topk", 2),
        "ffn_hidden_size": args.get("moe_ffn_hidden_size") or args.get("ffn_hidden_size"),
        "normalize_weights": not args.get("moe_router_pre_softmax", False),
    }


def _windowed_layers(args: dict[str, Any]) -> tuple[bool, ...] | None:
    """Megatron-core's window_attn_skip_freq: every Nth layer is without a window, or one entry a layer."""
    frequency = args.get("window_attn_skip_freq")
    if frequency is None or isinstance(frequency, list | tuple):
        return None if frequency is None else tuple(bool(entry) for entry in frequency)
    return tuple(number % frequency != 0 for number in range(1, args["num_layers"] + 1))


def _rope_scaling(args: dict[str, Any]) -> dict[str, Any] | None:
    """Our own note first; Megatron-LM itself knows Llama 3's (its other numbers fixed) and linear interpolation."""
    if args.get("distkv_rope_scaling"):
        return dict(args["distkv_rope_scaling"])
    if args.get("use_rope_scaling"):
        return {"kind": "llama3", "factor": args.get("rope_scaling_factor") or 8.0}
    if args.get("rotary_seq_len_interpolation_factor"):
        return {"kind": "linear", "factor": args["rotary_seq_len_interpolation_factor"]}
    return None


def write_args(config: ModelConfig, *, tensor_parallel: int = 1) -> argparse.Namespace:
    """What Megatron-LM keeps in its checkpoints, for this model."""
    scaling = config.rope_scaling
    window = config.sliding_window
    return argparse.Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_kv_heads,
        group_query_attention=True,
        kv_channels=config.head_dim,
        vocab_size=config.vocab_size,
        padded_vocab_size=-(-config.vocab_size // tensor_parallel) * tensor_parallel,
        position_embedding_type="rope" if config.rotary_percent > 0 else "none",
        rotary_percent=config.rotary_percent,
        rotary_base=config.rotary_base,
        use_rope_scaling=scaling is not None and scaling.kind == "llama3",
        rope_scaling_factor=scaling.factor if scaling is not None else 8.0,
        rotary_seq_len_interpolation_factor=scaling.factor
        if scaling is not None and scaling.kind == "linear"
        else None,
        distkv_rope_scaling=None if scaling is None else scaling.model_dump(),
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_layernorm,
        **({} if config.mixture is None else _written_mixture(config.mixture)),
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=None if config.windowed_layers is None else [int(x) for x in config.windowed_layers],
        distkv_family=config.family,
        distkv_family_options=config.family_options or None,
        norm_epsilon=config.norm_epsilon,
        normalization="RMSNorm",
        **{"apply_layernorm_1p": False, "swiglu": True, **family_of(config).parts.megatron_args},
        add_bias_linear=False,
        untie_embeddings_and_output_weights=not config.tie_embeddings,
        max_position_embeddings=config.max_context_tokens,
        bf16=config.dtype == "bf16",
        eos_token_ids=list(config.eos_token_ids),
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=1,
    )


def _written_mixture(mixture: MixtureConfig) -> dict[str, Any]:
    return {
        "num_experts": mixture.num_experts,
        "moe_router_topk": mixture.experts_per_token,
        "moe_ffn_hidden_size": mixture.ffn_hidden_size,
        "moe_router_pre_softmax": not mixture.normalize_weights,
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": 1,
    }


def args_of(state: Any, path: Path) -> dict[str, Any]:
    """The args in a loaded checkpoint file, as a mapping."""
    args = state.get("args") if isinstance(state, dict) else None
    if args is None:
        raise CheckpointError(f"{path} holds no args: the model's shape is unknown")
    return vars(args) if isinstance(args, argparse.Namespace) else dict(args)
