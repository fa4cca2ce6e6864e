"""Megatron models whose KV cache is spread over many instances."""

__version__ = "0.1.0"
