"""Step 4 of the demo: the same prompts on one instance with enough memory, token for token."""

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_distkv.launch.evaluate import ANSWER_TOKENS, recall_by_length
from tqdm import tqdm

from megatron_distkv.config.cluster import ClusterConfig
from megatron_distkv.config.instance import InstanceConfig
from megatron_distkv.rblock import num_rblocks_for
from megatron_distkv.sampling_params import SamplingParams
from tools.demo.serving import Observation, capacity_tokens

# Recall at the longest context that counts as holding it.
RECALL_TO_REACH = 1.0


@dataclass
class Proof:
    config: ClusterConfig
    seen: Observation
    reference: list[list[int]]
    refusal: str | None

    @property
    def identical(self) -> list[bool]:
        pairs = zip(self.seen.results, self.reference, strict=True)
        return [result.token_ids == tokens and len(tokens) == ANSWER_TOKENS for result, tokens in pairs]

    def report(self) -> dict[str, object]:
        by_length = recall_by_length(self.seen.results)
        longest = max(by_length)
        return {
            "longest_context_tokens": longest,
            "own_capacity_tokens": capacity_tokens(self.config).own,
            "recall_at_longest": by_length[longest],
            "tokens_identical": all(self.identical),
            "ledger_empty_at_end": not self.seen.at_end.loans,
            "instances": self.config.instances,
            "recall_by_length": by_length,
            "num_short_requests": self.seen.num_short,
            "num_short_wrong": self.seen.num_short_wrong,
            "most_rblocks_on_loan": sum(loan.num_rblocks for loan in self.seen.fullest.loans),
            "one_instance_alone_says": self.refusal,
            "prompts": [result.as_json() for result in self.seen.results],
        }

    def failures(self) -> list[str]:
        """What does not hold, in sentences."""
        return list(self._failures())

    def _failures(self) -> Iterator[str]:
        report = self.report()
        if not report["tokens_identical"]:
            yield f"{self.identical.count(False)} answers differ from those of one instance with enough memory"
        if report["recall_at_longest"] != RECALL_TO_REACH:
            yield f"recall at the longest context is {report['recall_at_longest']}, not {RECALL_TO_REACH}"
        if not report["ledger_empty_at_end"]:
            yield "the debt ledger is not empty at the end"
        if self.refusal is None:
            yield "one instance alone answers the longest prompt, too"
        if not self.seen.fullest.loans:
            yield "nothing was ever borrowed"
        if self.seen.num_short_wrong or not self.seen.num_short:
            yield f"{self.seen.num_short_wrong} of {self.seen.num_short} short requests had other tokens than alone"


def reference_tokens(config: ClusterConfig, seen: Observation) -> list[list[int]]:
    """Greedy tokens of each prompt on one instance that holds all of it."""
    warnings.filterwarnings("ignore", module="megatron.*")  # it tells of optional packages
    from megatron_distkv.engine.llm import LLM

    size = config.kv_cache.rblock_size
    enough = num_rblocks_for(max(length for length, _, _ in seen.asked) + ANSWER_TOKENS, size)
    greedy = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    with tempfile.TemporaryDirectory(prefix="distkv-") as run_dir:
        alone = InstanceConfig(
            instance_id="reference",
            model=config.model,
            run_dir=Path(run_dir),
            kv_cache=config.kv_cache.model_copy(update={"num_rblocks": enough}),
            scheduler=config.scheduler,
        )
        with LLM(alone) as llm:
            asked = tqdm(seen.asked, "one instance with enough memory", unit="prompt")
            return [llm.generate([prompt.token_ids], greedy)[0].token_ids for _, _, prompt in asked]
