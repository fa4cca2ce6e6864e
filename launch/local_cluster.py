"""A whole pool on this host: ledger server, gManager, instances, gateway; all end together."""

import os
import shutil
import signal
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from megatron_distkv.launch.commands import command_line, instance_command
from megatron_distkv.launch.processes import Child
from tqdm import tqdm

from megatron_distkv.cli.pool_arguments import LEDGER_VARIABLE
from megatron_distkv.config.admission import AdmissionConfig
from megatron_distkv.config.cluster import ClusterConfig
from megatron_distkv.config.instance import InstanceConfig, LedgerConfig
from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.errors import UserError
from megatron_distkv.ledger import DebtLedger, open_ledger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.log import get_logger
from megatron_distkv.transport import OPEN_POOL, read_secret, write_new_secret

logger = get_logger(__name__)
EMBEDDED = "embedded://"
# Of Linux: sun_path has 108 bytes, the last is 0.
MAX_SOCKET_PATH = 107
# One thread per process on a small host: libraries must not each start as many as there are cores.
_ENVIRONMENT = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}


class LocalCluster:
    """`with LocalCluster(config) as cluster:` returns when the gateway serves; raises UserError, all ended again."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.base_url = ""
        self.ledger_server: EmbeddedServer | None = None
        self._stack = ExitStack()
        self._children: dict[str, Child] = {}

    def __enter__(self) -> "LocalCluster":
        with ExitStack() as stack:
            self.run_dir = Path(tempfile.mkdtemp(prefix="distkv-"))
            stack.callback(shutil.rmtree, self.run_dir, ignore_errors=True)
            _require_room_for_sockets(self.run_dir)
            self.ledger_url = self._start_ledger(stack)
            self.secret_file = self._find_secret()
            self.ledger: DebtLedger = open_ledger(self.ledger_url, self.config.ledger.pool)
            stack.callback(self.ledger.close)
            stack.callback(self._end_children)
            self._start_children()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # ------------------------------------------------------------------ for tests and demos

    @property
    def instance_ids(self) -> list[str]:
        return [f"instance-{number}" for number in range(self.config.instances)]

    @property
    def lender_ids(self) -> list[str]:
        return [f"lender-{number}" for number in range(self.config.lenders)]

    def child(self, name: str) -> Child:
        return self._children[name]

    def kill(self, name: str) -> None:
        """kill -9 of a part and all its processes."""
        os.killpg(self._children[name].process.pid, signal.SIGKILL)
        self._children[name].process.wait()

    def restart(self, name: str) -> None:
        """Start a dead part again under its name; `wait_for` says when it is ready. From the main thread only."""
        old = self._children[name]
        old.log.rename(self.run_dir / f"{name}.{len(list(self.run_dir.glob(f'{name}.*')))}.log")
        self._children[name] = Child(name, old.command, old.log, old.env)

    def dead_parts(self) -> list[str]:
        return [name for name, child in self._children.items() if not child.is_running]

    # ------------------------------------------------------------------ inside

    def _start_ledger(self, stack: ExitStack) -> str:
        if self.config.ledger.url != EMBEDDED:
            return self.config.ledger.url
        self.ledger_server = stack.enter_context(EmbeddedServer())
        return self.ledger_server.url

    def _find_secret(self) -> Path | None:
        """The configured one or the environment's; else a new one, for this pool's life only."""
        configured = self.config.ledger.secret_file
        if read_secret(configured) != OPEN_POOL:
            return configured.resolve() if configured else None
        write_new_secret(self.run_dir / "secret")
        return self.run_dir / "secret"

    def _start_children(self) -> None:
        self._start("gmanager", command_line("gmanager", *self._pool_arguments(), "--interval", self._interval()))
        for name in self.instance_ids:
            config = self._instance_config(name)
            file = self.run_dir / f"{name}.json"
            file.write_text(config.model_dump_json())
            self._start(name, instance_command(config, file, self.config.launcher))
        for name in self.lender_ids:
            file = self.run_dir / f"{name}.json"
            file.write_text(self._lender_config(name).model_dump_json())
            self._start(name, command_line("lend", "--config", str(file)))
        self.wait_for(["gmanager", *self.instance_ids, *self.lender_ids])
        gateway = command_line(
            "gateway", *self._pool_arguments(), "--host", self.config.host, "--port", str(self.config.port),
            "--served-model-name", self.config.served_model_name, *_options(self.config.admission),
        )  # fmt: skip
        self._start("gateway", gateway)
        self.wait_for(["gateway"])
        ready = self._children["gateway"].ready_line() or ""
        self.base_url = ready.split()[-1]

    def _pool_arguments(self) -> list[str]:
        return ["--pool", self.config.ledger.pool]

    def _interval(self) -> str:
        return str(self.config.plan_interval_s)

    def _instance_config(self, name: str) -> InstanceConfig:
        config = self.config
        return InstanceConfig(
            instance_id=name,
            model=config.model.resolve(),
            run_dir=self.run_dir,
            dtype=config.dtype,
            deterministic=config.deterministic,
            tensor_parallel=config.tensor_parallel,
            threads=config.threads,
            kv_cache=config.kv_cache,
            scheduler=config.scheduler,
            lending=config.lending,
            ledger=self._ledger_config(),
        )

    def _lender_config(self, name: str) -> LenderConfig:
        return LenderConfig(
            lender_id=name,
            run_dir=self.run_dir,
            num_rblocks=self.config.lender_rblocks,
            threads=self.config.threads,
            ledger=self._ledger_config(),
        )

    def _ledger_config(self) -> LedgerConfig:
        return self.config.ledger.model_copy(update={"url": self.ledger_url, "secret_file": self.secret_file})

    def _start(self, name: str, command: list[str]) -> None:
        # The ledger's URL may hold a password: on a command line everybody could read it.
        env = {**_ENVIRONMENT, "OMP_NUM_THREADS": str(self.config.threads), LEDGER_VARIABLE: self.ledger_url}
        self._children[name] = Child(name, command, self.run_dir / f"{name}.log", env)

    def wait_for(self, names: list[str]) -> None:
        deadline = time.monotonic() + self.config.start_timeout_s
        missing = list(names)
        with tqdm(total=len(names), desc=f"starting {names[-1]}", unit="part", leave=False) as bar:
            while missing:
                for name in [name for name in missing if self._is_ready(name)]:
                    missing.remove(name)
                    bar.update()
                if missing and time.monotonic() > deadline:
                    raise UserError(f"{', '.join(missing)} did not start within {self.config.start_timeout_s:.0f} s")
                time.sleep(0.05)

    def _is_ready(self, name: str) -> bool:
        child = self._children[name]
        if child.ready_line() is not None:
            return True
        if not child.is_running:
            raise UserError(f"{name} did not start: {child.error_line()}")
        return False

    def _end_children(self) -> None:
        """The gateway first, so that no request meets a dying instance."""
        for child in reversed(list(self._children.values())):
            child.terminate()
        for child in reversed(list(self._children.values())):
            child.end()


def _options(admission: AdmissionConfig) -> list[str]:
    values = admission.model_dump()
    return [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def _require_room_for_sockets(run_dir: Path) -> None:
    """A unix socket's path has a limit of the kernel, and the sockets of all parts lie in the run directory."""
    longest = len(os.fsencode(run_dir)) + len("/instance-00.requests.sock")
    if longest > MAX_SOCKET_PATH:
        raise UserError(
            f"{run_dir.parent} is too long a path for sockets ({longest} bytes with theirs, not {MAX_SOCKET_PATH}): "
            "set TMPDIR to a shorter one"
        )
