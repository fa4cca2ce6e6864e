"""Keys of Hugging Face's config.json that families share, to ModelConfig's fields and back."""

from megatron_distkv.model.config_json.shared_keys import read_shared, write_shared
from megatron_distkv.model.config_json.windows import read_layer_types, read_windows, write_layer_types

__all__ = ["read_layer_types", "read_shared", "read_windows", "write_layer_types", "write_shared"]
