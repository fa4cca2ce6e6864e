"""What other instances may ask of a member's leader, by message kind."""

import msgspec

from megatron_distkv.attention import Creditor, asker_of
from megatron_distkv.errors import DistkvError
from megatron_distkv.handover import IncomingHandovers
from megatron_distkv.messages import (
    Acknowledge,
    CommitHeader,
    Holder,
    InheritHeader,
    LendHeader,
    MessageKind,
    PrepareHeader,
    ReleaseHeader,
    decode,
)
from megatron_distkv.rblock import LoanId
from megatron_distkv.rmanager import Lending
from megatron_distkv.transport import Answer, ChannelRequest, Hello


class LenderHandler:
    """The handler of the leader's listener: loans to the rManager, tensors to the creditor.

    Without `incoming`, as in a memory-only lender, nobody may hand a request over.
    """

    def __init__(self, lending: Lending, creditor: Creditor, incoming: IncomingHandovers | None = None) -> None:
        self._lending = lending
        self._creditor = creditor
        self._incoming = incoming

    def answer(self, hello: Hello, request: ChannelRequest) -> Answer:
        asker = asker_of(hello, request)
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
                return _answer(self._lending.lend(self._own(hello, request), asker))
            case MessageKind.RELEASE:
                return _answer(self._release(asker, decode(request.header, ReleaseHeader)))
            case MessageKind.INHERIT:
                return _answer(self._lending.transfer(decode(request.header, InheritHeader), asker))
            case MessageKind.PREPARE if self._incoming is not None:
                return _answer(self._incoming.prepare(decode(request.header, PrepareHeader), asker))
            case MessageKind.COMMIT if self._incoming is not None:
                return _answer(self._incoming.commit(decode(request.header, CommitHeader), asker))
            case kind:
                raise DistkvError(f"this leader does not take {kind.name}")

    def _release(self, asker: Holder, header: ReleaseHeader) -> Acknowledge:
        if self._incoming is not None and self._incoming.give_up(header.loan_id, asker):
            return Acknowledge()
        return Acknowledge(self._lending.release(LoanId(header.loan_id), asker))

    @staticmethod
    def _own(hello: Hello, request: ChannelRequest) -> LendHeader:
        header = decode(request.header, LendHeader)
        if header.debtor != hello.instance_id:
            raise DistkvError(f"{hello.instance_id} asks for a loan in the name of {header.debtor}")
        return header


def _answer(reply: msgspec.Struct) -> Answer:
    return Answer(msgspec.msgpack.encode(reply))
