"""`distkv gateway`: the OpenAI-compatible HTTP server of a pool."""

import argparse

import uvicorn

from megatron_distkv.cli.listening import listen_on
from megatron_distkv.cli.pool_arguments import add_pool_arguments
from megatron_distkv.clock import SystemClock
from megatron_distkv.config.admission import AdmissionConfig
from megatron_distkv.config.base import parse_config
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.log import setup_logging
from megatron_distkv.server.app import Gateway


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pool_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one and prints it")
    parser.add_argument("--served-model-name", default="distkv", help="the model's name in the API")
    parser.add_argument("--max-queued-requests", type=int, help="requests held until the pool has room; one more: 429")
    parser.add_argument("--max-queue-wait-s", type=float, help="a request held for this long is refused with 429")
    parser.add_argument("--overtake-within-s", type=float, help="shorter requests overtake one that waits, for so long")


def run(args: argparse.Namespace) -> int:
    setup_logging("gateway")
    admission = _admission(args)
    gateway = Gateway(open_ledger(args.ledger, args.pool), args.served_model_name, admission, SystemClock())
    listening = listen_on(args.host, args.port)
    host, port = listening.getsockname()[:2]
    print(f"READY gateway http://{host}:{port}/v1", flush=True)
    config = uvicorn.Config(gateway.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _admission(args: argparse.Namespace) -> AdmissionConfig:
    values = {key: getattr(args, key) for key in AdmissionConfig.model_fields}
    given = {key: value for key, value in values.items() if value is not None}
    return parse_config(AdmissionConfig, given, "distkv gateway")
