"""What the benchmark says of a kernel follows from the seconds that it and its ceiling took."""

import pytest

from megatron_distkv.ops import backend_in_use
from tools.bench.ceilings import TimedElsewhere
from tools.bench.cpu_kernels import moves
from tools.bench.cpu_kernels.figure import Amount, Run
from tools.bench.micro_attention import measure

RUN = Run(threads=1, runs=1)


def test_a_share_is_that_of_the_ceilings_rate_where_its_calls_do_more() -> None:
    # Given work that does 10 GB in 2 s, a ceiling that does 20 GB in 1 s, and a peer that takes 3 s
    seconds = {"ours": 2.0, "ceiling": 1.0, "peer": 3.0}
    works = {name: TimedElsewhere(lambda took=took: took) for name, took in seconds.items()}

    # When it is measured
    figure = RUN.figure("work", works, Amount(10.0, "GB/s", of_ceiling=20.0))

    # Then
    assert (figure.value, figure.ceiling, figure.share) == (5.0, 20.0, 0.25)
    assert figure.peers == {"peer": 1.5}


def test_a_wrong_answer_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "NUM_TOKENS", 2)
    monkeypatch.setattr(moves, "merge_out", lambda outs, lses, out, lse: out.copy_(outs.mean(0)))

    with pytest.raises(SystemExit, match="wrong answer"):
        measure(RUN, "moves")


@pytest.mark.skipif(backend_in_use() != "cpu", reason="the C++ kernels were not built here")
def test_one_kind_of_work_alone(capsys: pytest.CaptureFixture[str]) -> None:
    figures = measure(RUN, "dispatch")

    assert [figure.work for figure in figures] == [
        "dispatch of a decode call, new results",
        "dispatch of a decode call, results at hand",
    ]
    assert len(capsys.readouterr().out.splitlines()) == len(figures)
