"""`distkv doctor` on this machine, and on ones with less: real interpreters that lack the packages."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_distkv.cli.doctor import GIB, free_memory_bytes
from megatron_distkv.cli.main import main
from megatron_distkv.ledger.embedded_server import find_server_binary

ROOT = Path(__file__).parents[2]


def doctor_elsewhere(folder: Path | None = None, *, bare: bool = False) -> subprocess.CompletedProcess[str]:
    """With the packages in `folder` first; `bare`: with no other packages than Python's own.

    Ends with the imported modules' names on stderr.
    """
    paths = [str(path) for path in (folder, ROOT) if path is not None]
    code = (
        f"import sys; sys.path[:0] = {paths}\n"
        "from megatron_distkv.cli.main import main\n"
        "status = main(['doctor']); print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    command = [sys.executable, *(["-S"] if bare else []), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def line_of(thing: str, output: str) -> str:
    [line] = [line for line in output.splitlines() if line[2:].startswith(f"{thing}  ")]
    return line


def pretend_installed(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_this_machine_can_serve_and_every_line_says_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    lines, verdict = output.rstrip().split("\n\n")
    assert "can serve" in verdict
    assert str(torch.__version__) in line_of("torch", output)
    assert str(find_server_binary()) in line_of("ledger server", output)
    assert "reference" in line_of("kernel backends", output)
    # Three columns, each beginning at one place, none empty
    starts = {tuple(m.start() for m in re.finditer(r"(?<=  )\S", line[2:]))[:2] for line in lines.splitlines()}
    columns = [re.split(r" {2,}", line[2:].strip()) for line in lines.splitlines()]
    assert len(starts) == 1
    assert all(len(row) == 3 for row in columns)


def test_without_any_package_it_names_what_is_missing(tmp_path: Path) -> None:
    done = doctor_elsewhere(bare=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for thing in ("torch", "megatron-core", "deepspeed", "other packages", "ledger server"):
        assert line_of(thing, done.stdout).startswith("! "), thing
    for thing in ("NVIDIA Apex", "flash-attn", "NIXL", "numactl"):
        assert line_of(thing, done.stdout).startswith("  "), thing
    assert "cannot serve yet: see torch, megatron-core, deepspeed, other packages, ledger server." in done.stdout


def test_of_the_heavy_packages_only_torch_is_imported() -> None:
    imported = set(doctor_elsewhere().stderr.split())
    assert "torch" in imported
    assert not imported & {"megatron.core", "deepspeed", "transformers", "transformer_engine", "flash_attn", "nixl"}


def test_what_would_serve_is_imported_not_judged_by_its_version(tmp_path: Path) -> None:
    # Given a Megatron-core whose metadata are fine, and which lacks what we import of it
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").touch()
    done = doctor_elsewhere(tmp_path)
    # Then it says which import fails, and what would work
    assert done.returncode == 1
    assert line_of("megatron-core", done.stdout).startswith("  ")
    for part in ("serving", "training"):
        line = line_of(part, done.stdout)
        assert re.search(
            r"broken +megatron_distkv\.[\w.]+: No module named 'megatron.core'; .*(proven|install)", line
        ), line
    assert line_of("serving", done.stdout).startswith("! ")
    assert done.stdout.strip().endswith("This machine cannot serve yet: see serving.")


def test_versions_that_differ_from_the_proven_ones_are_named(tmp_path: Path) -> None:
    pretend_installed(tmp_path, "megatron-core", "0.16.99")
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").touch()
    line = line_of("serving", doctor_elsewhere(tmp_path).stdout)
    minor = f"{sys.version_info.major}{sys.version_info.minor}"
    assert re.search(r"megatron-core 0\.1\d\.\d \(here: 0\.16\.99\)", line)
    assert re.search(rf"pip install -c \S+constraints/py{minor}\.txt megatron-core", line)


def test_a_torch_that_cannot_be_loaded_is_broken_not_missing(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libtorch.so: no such file\\nmore')")
    done = doctor_elsewhere(tmp_path)
    assert done.returncode == 1
    assert "broken" in line_of("torch", done.stdout)
    assert line_of("torch", done.stdout).endswith("libtorch.so: no such file")


def test_a_version_that_is_too_old_blocks(tmp_path: Path) -> None:
    pretend_installed(tmp_path, "megatron-core", "0.9.0")
    pretend_installed(tmp_path, "msgspec", "0.1")
    done = doctor_elsewhere(tmp_path)
    assert done.returncode == 1
    assert re.search(r"^! megatron-core +0\.9\.0 +megatron-core 0\.9\.0 is here, \S*>=", done.stdout, re.M)
    assert "msgspec 0.1 is here" in line_of("other packages", done.stdout)
    assert done.stdout.strip().endswith("see megatron-core, other packages.")


def test_pypis_apex_is_told_from_nvidias_without_running_either(tmp_path: Path) -> None:
    # Given a package of that name that must not be run
    apex = tmp_path / "apex"
    apex.mkdir()
    (apex / "__init__.py").write_text("raise SystemExit('imported')")
    # Then it is an impostor, until it has NVIDIA's folders and its compiled kernels
    assert "an impostor" in line_of("NVIDIA Apex", doctor_elsewhere(tmp_path, bare=True).stdout)
    (apex / "normalization").mkdir()
    assert "here, Python only" in line_of("NVIDIA Apex", doctor_elsewhere(tmp_path, bare=True).stdout)
    (tmp_path / "amp_C.py").touch()
    assert re.search(r"Apex +here  ", line_of("NVIDIA Apex", doctor_elsewhere(tmp_path, bare=True).stdout))


def test_an_apex_blocks_nothing_as_a_model_is_built_beside_it(tmp_path: Path) -> None:
    # Given any package that `import apex` finds
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    # When a model is built beside it
    code = (
        f"import sys; sys.path[:0] = {[str(tmp_path), str(ROOT)]}\n"
        "from megatron_distkv.config.model import ModelConfig\n"
        "from megatron_distkv.model import build_gpt, init_tensor_parallel\n"
        "build_gpt(ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1,"
        " num_kv_heads=1, head_dim=8, vocab_size=8), init_tensor_parallel(1))"
    )
    built = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    # Then that works, and the doctor says so
    assert built.returncode == 0, built.stderr
    line = line_of("NVIDIA Apex", doctor_elsewhere(tmp_path).stdout)
    assert "not used" in line
    assert not line.startswith("! ")


def test_optional_packages_are_seen_with_their_version(tmp_path: Path) -> None:
    for name, module, version in (("flash-attn", "flash_attn", "2.8.3"), ("nixl-cu13", "nixl_cu13", "1.5.1")):
        pretend_installed(tmp_path, name, version)
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise ImportError('not for this machine')")
    done = doctor_elsewhere(tmp_path)
    assert done.returncode == 0
    assert "2.8.3" in line_of("flash-attn", done.stdout)
    assert "1.5.1" in line_of("NIXL", done.stdout)


@pytest.mark.parametrize(
    ("limit", "expected_gib"),
    [("max", 10), (str(4 * GIB), 4 - (3 - 1)), (str(1 * GIB), 0), (None, 10)],
)
def test_a_containers_limit_counts_less_what_it_uses_and_cannot_give_back(
    limit: str | None, expected_gib: int, tmp_path: Path
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {10 * 2**20} kB\nHugePages_Total: 0\n")
    (tmp_path / "memory.current").write_text(str(3 * GIB))
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit + "\n")
    assert free_memory_bytes(tmp_path, tmp_path) == expected_gib * GIB
    assert free_memory_bytes(tmp_path / "nowhere", tmp_path) is None
