"""What is quoted as the cause of a process's end."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from megatron_distkv.launch.cause import cause_of
from megatron_distkv.launch.processes import Child

TRACEBACK = 'Traceback (most recent call last):\n  File "serve.py", line 3, in f\n    f()\n    ~^^\n'
LAUNCHER = (
    "[2026-11-30 16:00:00,000] [INFO] [launch.py:335:sigkill_handler] Killing subprocess 7\n"
    "[2026-11-30 16:00:00,000] [ERROR] [launch.py:341:sigkill_handler] ['serve.py'] exits with return code = {status}\n"
)
LOG = "12:00:00.000 I instance-0 distkv.model: loading x\n12:00:01.000 W asyncio: socket.send() raised exception.\n"


@pytest.mark.parametrize(
    ("output", "status", "cause"),
    [
        # Our own sentence, which comes before what follows from it
        (LOG + "ERROR no checkpoint at /x\ndistkv serve: no checkpoint at /x\n" + LAUNCHER, 1, "no checkpoint at /x"),
        (LOG + "distkv gateway: cannot listen on 127.0.0.1:80\n", 2, "cannot listen on 127.0.0.1:80"),
        # An exception, the last of several, of a rank too, and not that of the launcher, nor one that was ignored
        (TRACEBACK + "ValueError: a\n\nDuring handling:\n\n" + TRACEBACK + "KeyError: 'b'\n", 1, "KeyError: 'b'"),
        ("[rank1]: Traceback (most recent call last):\n[rank1]:   File \"x\"\n[rank1]: torch.Oops: c\n" + LAUNCHER, 1,
         "torch.Oops: c"),
        (TRACEBACK + "RuntimeError: d\n" + TRACEBACK.replace("serve.py", "/deepspeed/launcher/launch.py") + "E: e\n", 1,
         "RuntimeError: d"),
        (TRACEBACK + "RuntimeError: f\nException ignored in: <function g>\n" + TRACEBACK + "TypeError: h\n", 1,
         "RuntimeError: f"),
        # A signal, whatever was logged before
        (LOG + TRACEBACK + "ValueError: logged\n" + LOG, -signal.SIGKILL, "killed by SIGKILL"),
        ("Fatal Python error: Segmentation fault\n\nCurrent thread 0x1\n", -11, "Segmentation fault, SIGSEGV"),
        (LOG + LAUNCHER.format(status=-9), 247, "a rank of it was killed by SIGKILL"),
        # Else what it said last, but for what asyncio and the launcher say at each end
        ("No module named megatron\n" + LOG.splitlines()[1] + "\n" + LAUNCHER.format(status=1), 1,
         "No module named megatron"),
        ("", 1, "it said nothing"),
    ],
)  # fmt: skip
def test_the_cause_is_found_in_the_noise(output: str, status: int, cause: str) -> None:
    assert cause_of(output, status) == cause


def test_the_end_of_a_real_process_is_told(tmp_path: Path) -> None:
    for code, cause in (
        ("import os, sys; print('x'); os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("raise SystemError('so')", "SystemError: so"),
        ("print('ERROR bad input'); print('more'); raise SystemExit(2)", "bad input"),
        ("print('y' * 1_000_000); raise OSError('late')", "OSError: late"),
    ):
        child = Child("one", [sys.executable, "-c", code], tmp_path / "one.log")
        child.process.wait()
        assert child.error_line() == cause


def test_a_crash_of_the_interpreter_is_told() -> None:
    code = "import ctypes; ctypes.string_at(0)"
    ended = subprocess.run([sys.executable, "-X", "faulthandler", "-c", code], stderr=subprocess.PIPE, text=True)
    assert cause_of(ended.stderr, ended.returncode) == "Segmentation fault, SIGSEGV"
