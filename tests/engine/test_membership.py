"""Who may join a pool: only members whose rBlocks look alike could compute over each other's."""

from typing import Any

import pytest

from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.engine.llm import LLM
from megatron_distkv.errors import UserError
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from tests.conftest import MakeConfig


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"kv_cache": {"num_rblocks": 8, "rblock_size": 16}}, "rblock_size 16, not 8 as those of a"),
        ({"dtype": "bf16"}, "dtype bf16, not fp32 as those of a"),
    ],
)
def test_rblocks_of_another_shape_cannot_join(
    changes: dict[str, Any], what: str, make_config: MakeConfig, server: EmbeddedServer
) -> None:
    # Given a pool with one instance
    with LLM(make_config("a", url=server.url)) as a:
        values = {**make_config("b", url=server.url).model_dump(), **changes}
        # When one with other rBlocks wants to join, then it is told why not, and the pool never hears of it
        with pytest.raises(UserError, match=f"b cannot join pool 'default': its rBlocks have {what}"):
            LLM(InstanceConfig.model_validate(values))
        assert [record.instance for record in a.instance._ledger.snapshot().instances] == ["a"]
