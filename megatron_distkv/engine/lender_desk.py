"""What other instances may ask of an instance's leader, by message kind."""

import msgspec

from megatron_distkv.attention import Creditor
from megatron_distkv.errors import DistkvError
from megatron_distkv.messages import Acknowledge, LendHeader, MessageKind, ReleaseHeader, decode
from megatron_distkv.rblock import LoanId
from megatron_distkv.rmanager import Lending
from megatron_distkv.transport import Answer, Hello, Request


class LenderDesk:
    """The handler of the leader's listener: loans to the rManager, tensors to the creditor."""

    def __init__(self, lending: Lending, creditor: Creditor) -> None:
        self._lending = lending
        self._creditor = creditor

    def answer(self, hello: Hello, request: Request) -> Answer:
        match MessageKind(request.kind):
            case MessageKind.QUERY:
                return self._creditor.query(hello, request)
            case MessageKind.STORE:
                return self._creditor.store(hello, request)
            case MessageKind.FETCH:
                return self._creditor.fetch(hello, request)
            case MessageKind.PROBE:
                return Answer(b"")
            case MessageKind.LEND:
                return Answer(msgspec.msgpack.encode(self._lending.lend(self._own(hello, request))))
            case MessageKind.RELEASE:
                header = decode(request.header, ReleaseHeader)
                refusal = self._lending.release(LoanId(header.loan_id), hello.instance_id)
                return Answer(msgspec.msgpack.encode(Acknowledge(refusal)))
            case kind:
                raise DistkvError(f"an instance's leader does not take {kind.name}")

    @staticmethod
    def _own(hello: Hello, request: Request) -> LendHeader:
        header = decode(request.header, LendHeader)
        if header.debtor != hello.instance_id:
            raise DistkvError(f"{hello.instance_id} asks for a loan in the name of {header.debtor}")
        return header
