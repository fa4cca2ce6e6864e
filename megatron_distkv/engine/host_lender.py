"""The memory-only lender of an instance's own: lends host memory that the instance does not need itself."""

from megatron_distkv.background import Fatal
from megatron_distkv.clock import Clock
from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.config.network import NetworkConfig
from megatron_distkv.engine.lender import Lender
from megatron_distkv.kvcache.rblock_shape import RBlockShape
from megatron_distkv.ledger.opening import open_ledger


def open_host_lender(config: InstanceConfig, shape: RBlockShape, fatal: Fatal, clock: Clock) -> Lender | None:
    """A member of the pool named `ID.host`, from now on; None where the configuration gives it no memory."""
    if not config.kv_cache.num_lent_host_rblocks:
        return None
    lender = LenderConfig(
        lender_id=f"{config.instance_id}.host",
        run_dir=config.run_dir,
        num_rblocks=config.kv_cache.num_lent_host_rblocks,
        ledger=config.ledger,
        network=_behind_the_ranks(config.network, config.tensor_parallel),
    )
    ledger = open_ledger(config.ledger.url, config.ledger.pool, clock=clock)
    return Lender(lender, shape, ledger, fatal, clock=clock)


def _behind_the_ranks(network: NetworkConfig, num_ranks: int) -> NetworkConfig:
    """Where it listens for other hosts: at the port after those of the instance's ranks."""
    if network.endpoint is None:
        return network
    return network.model_copy(update={"listen": str(network.endpoint.of_rank(num_ranks))})
