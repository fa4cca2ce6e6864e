"""What only the ranks of one instance know, so that no other member of the pool can give their followers orders."""

import secrets

import torch
import torch.distributed as dist

SECRET_BYTES = 32


def share_instance_secret() -> bytes:
    """A new one, made by rank 0 and the same on all ranks; all of them call it at the same point of their start."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    secret = torch.tensor(list(secrets.token_bytes(SECRET_BYTES)), dtype=torch.uint8, device=device)
    dist.broadcast(secret, src=0)
    return bytes(secret.tolist())
