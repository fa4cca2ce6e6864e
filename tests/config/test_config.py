"""A mistake in a configuration becomes one sentence that names the key and the file."""

from pathlib import Path

import pytest

from megatron_distkv.config.base import load_config, parse_config
from megatron_distkv.config.cluster import ClusterConfig
from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.config.train import TrainConfig
from megatron_distkv.errors import ConfigError

SHIPPED = Path(__file__).parents[2] / "configs"
NEEDED = {"model": "checkpoint", "run_dir": "run"}


def test_defaults_are_usable() -> None:
    config = parse_config(InstanceConfig, NEEDED, "test")
    assert config.kv_cache.rblock_size == 64
    assert config.ledger.url == "memory://"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({**NEEDED, "kv_cach": {}}, "unknown key 'kv_cach'; known keys here: instance_id, model"),
        ({**NEEDED, "kv_cache": {"rblocks": 3}}, "unknown key 'kv_cache.rblocks'; known keys here: num_rblocks"),
        ({"run_dir": "run"}, "the key 'model' is missing"),
        ({**NEEDED, "tensor_parallel": 0}, "tensor_parallel: Input should be greater than or equal to 1"),
        ({**NEEDED, "ledger": {"pool": "a b"}}, "ledger.pool: String should match pattern"),
    ],
)
def test_a_mistake_is_one_sentence(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(InstanceConfig, values, "pool.yaml")
    assert str(caught.value).startswith("pool.yaml: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_read_and_a_missing_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("model: checkpoint\ninstances: 6\n")
    assert load_config(ClusterConfig, path).instances == 6
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(ClusterConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", ["[1, 2", "- a list"])
def test_what_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(ClusterConfig, path)


def test_what_we_ship_can_be_read() -> None:
    files = {"train": TrainConfig, "cluster": ClusterConfig}
    for folder, config in files.items():
        paths = sorted((SHIPPED / folder).glob("*.yaml"))
        assert paths
        for path in paths:
            assert load_config(config, path)
