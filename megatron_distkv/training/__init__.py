"""Training: DeepSpeed ZeRO around Megatron's tensor-parallel GPT, with the attention that serves it later."""
