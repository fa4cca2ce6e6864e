"""Errors in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, each with its HTTP status."""

from megatron_distkv.errors import DistkvError


class ApiError(DistkvError):
    """One sentence for the client."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, retry_after_s: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, object]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class InstanceLost(DistkvError):
    """The instance that computed a request is gone."""


class InstanceSilent(InstanceLost):
    """Its lease has ended, though its connection has not: it hangs, or the ledger does not hear it."""


class HandedElsewhere(InstanceLost):
    """The instance leaves; its successor, if it names one, has the request's KV under `handover_id`."""

    def __init__(self, instance_id: str, successor: str, handover_id: str) -> None:
        super().__init__(f"instance {instance_id} leaves, and hands over to {successor or 'anybody'}")
        self.successor = successor
        self.handover_id = handover_id


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def from_refusal(code: str, message: str) -> ApiError:
    """What an instance's refusal means to a client."""
    if code == "too_long":
        return ApiError(400, message, param="prompt", code="context_length_exceeded")
    if code == "queue_full":
        return ApiError(429, message, kind="rate_limit_error", code="queue_full", retry_after_s=1)
    if code == "bad_request":
        return bad_request(message, "prompt")
    if code == "bad_logits":  # of this request's own tokens: nobody else would compute others
        return ApiError(500, message, kind="server_error", code=code)
    return ApiError(503, message, kind="server_error", code=code)
