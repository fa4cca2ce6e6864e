"""What a run refuses before it writes anything."""

from pathlib import Path
from typing import Any

import pytest

from megatron_distkv.config.base import load_config
from megatron_distkv.config.train import TrainConfig
from megatron_distkv.errors import ConfigError
from megatron_distkv.training.train import Trainer

SHIPPED = Path(__file__).parents[2] / "configs" / "train" / "documents.yaml"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"family": "gemma9"}, "model.family: the family 'gemma9' is not known; known: gemma2, "),
        ({"family": "gemma2"}, "model.family_options: the key 'score_scale_dims' is missing"),
        ({"family_options": {"score_soft_cap": 30.0}}, "model.family_options: unknown key 'score_soft_cap'"),
    ],
)
def test_a_family_that_is_none(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    config = load_config(TrainConfig, SHIPPED)
    config = config.model_copy(update={"model": config.model.model_copy(update=changes)})
    with pytest.raises(ConfigError) as caught:
        Trainer(config, tmp_path / "run")
    assert str(caught.value).startswith(sentence)
    assert not (tmp_path / "run").exists()
