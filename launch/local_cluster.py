"""A whole pool on this host: ledger server, gManager, instances, gateway; all end together."""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from megatron_distkv.launch.cause import cause_of
from megatron_distkv.launch.commands import command_line, instance_command
from megatron_distkv.launch.log_folder import LogFolder
from megatron_distkv.launch.member_names import require_free_names
from megatron_distkv.launch.processes import GRACE_S, Child
from megatron_distkv.launch.supervisor import Ended
from tqdm import tqdm

from megatron_distkv.cli.listening import listen_on
from megatron_distkv.cli.pool_arguments import LEDGER_VARIABLE
from megatron_distkv.config.admission import AdmissionConfig
from megatron_distkv.config.cluster import ClusterConfig
from megatron_distkv.config.instance import InstanceConfig, LedgerConfig
from megatron_distkv.config.lender import LenderConfig
from megatron_distkv.errors import LedgerUnavailable, SupersededError, UserError
from megatron_distkv.ledger import DebtLedger
from megatron_distkv.ledger.embedded_server import EmbeddedServer
from megatron_distkv.ledger.opening import open_ledger
from megatron_distkv.ledger.url import shown
from megatron_distkv.log import get_logger
from megatron_distkv.transport import OPEN_POOL, read_secret, write_new_secret

logger = get_logger(__name__)
EMBEDDED = "embedded://"
# The name of the embedded server among the parts.
LEDGER = "ledger"
# While parts start.
LOOK_INTERVAL_S = 0.05
# Of Linux: sun_path has 108 bytes, the last is 0.
MAX_SOCKET_PATH = 107
# One thread per process on a small host: libraries must not each start as many as there are cores.
_ENVIRONMENT = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}


class LocalCluster:
    """`with LocalCluster(config) as cluster:` returns when the gateway serves; raises UserError, all ended again.

    From the main thread: the kernel ties the life of each part to the thread that started it. `say` gets sentences for
    a person. Once `stop` is set, a start raises KeyboardInterrupt.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        say: Callable[[str], None] = logger.info,
        stop: threading.Event | None = None,
        keeps_logs: bool = False,
    ) -> None:
        self.config = config
        self.base_url = ""
        self.ledger_server: EmbeddedServer | None = None
        self.logs: LogFolder | None = None
        self.keeps_logs = keeps_logs
        """When all has ended; looked at then. With `config.log_dir` they stay anyway."""
        self._say = say
        self._stop = stop or threading.Event()
        self._stack = ExitStack()
        self._children: dict[str, Child] = {}

    def __enter__(self) -> "LocalCluster":
        with ExitStack() as stack:
            self.run_dir = Path(tempfile.mkdtemp(prefix="distkv-"))
            stack.callback(self._remove_run_dir)
            _require_room_for_sockets(self.run_dir)
            self.logs = LogFolder(self.config.log_dir.resolve() if self.config.log_dir else self.run_dir)
            self._say_logs()
            try:
                self._start_all(stack)
            except UserError as error:
                self.logs.note(f"the pool did not start: {error}")
                raise
            except KeyboardInterrupt:
                self.keeps_logs = False  # nothing has failed
                raise
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def say(self, sentence: str) -> None:
        """To a person, and into the log of the pool itself."""
        if self.logs is not None:
            self.logs.note(sentence)
        self._say(sentence)

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

    def dead_parts(self) -> list[str]:
        """Without the ledger server."""
        return [name for name, child in self._children.items() if not child.is_running]

    # ------------------------------------------------------------------ for who looks after the parts

    @property
    def part_names(self) -> list[str]:
        """In the order in which they are started."""
        return [*([LEDGER] if self.ledger_server is not None else []), *self._children]

    def restart(self, name: str) -> None:
        """Start a dead part again under its name; `wait_for` says when it is ready. Raises UserError."""
        if name == LEDGER and self.ledger_server is not None:
            assert self.logs is not None
            self.logs.new_log(name)  # it writes to the name, not to the file
            self.ledger_server.start()
            return
        self._children[name].end(grace_s=0)  # what it has started may have outlived it
        self._start(name, list(self._children[name].command))

    def ended(self, name: str) -> Ended | None:
        """None: it runs."""
        if name == LEDGER and self.ledger_server is not None:
            status = self.ledger_server.exit_status
            return None if status is None else Ended(status, cause_of(self.ledger_server.last_line(), status))
        status = self._children[name].process.poll()
        if status is None:
            return None
        # Members say that they leave: deepspeed's launcher also ends with 0 when it was killed itself. Nobody else can
        # leave, the others need all parts.
        child = self._children[name]
        return Ended(
            status,
            child.error_line(),
            is_in_order=status == 0 and child.line_after("LEFT ") is not None,
            is_replaced=status == SupersededError.exit_status,
        )

    def is_ready(self, name: str) -> bool:
        """Whether it has said so in its present life."""
        return name == LEDGER or self._children[name].ready_line() is not None

    # ------------------------------------------------------------------ inside

    def _say_logs(self) -> None:
        assert self.logs is not None
        fate = "kept" if self.config.log_dir else "removed after a clean end; --log-dir DIR keeps them always"
        self.say(f"logs: {self.logs.path} ({fate})")

    def _start_all(self, stack: ExitStack) -> None:
        if self.config.port:  # now, rather than when all instances have loaded
            listen_on(self.config.host, self.config.port).close()
        self.ledger_url = self._start_ledger(stack)
        self.secret_file = self._find_secret()
        self.ledger: DebtLedger = open_ledger(self.ledger_url, self.config.ledger.pool)
        stack.callback(self.ledger.close)
        self._require_free_names()
        stack.callback(self._end_children)
        self._start_children()

    def _start_ledger(self, stack: ExitStack) -> str:
        if self.config.ledger.url != EMBEDDED:
            return self.config.ledger.url
        assert self.logs is not None
        self.ledger_server = stack.enter_context(EmbeddedServer(log=self.logs.new_log(LEDGER)))
        return self.ledger_server.url

    def _require_free_names(self) -> None:
        where = f"pool {self.config.ledger.pool!r} at {shown(self.ledger_url)}"
        try:
            require_free_names(self.ledger, [*self.instance_ids, *self.lender_ids], where, self.say, self._stop)
        except LedgerUnavailable as error:
            raise UserError(f"{where} cannot be read: {error}") from None

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
        self._start("gateway", self._gateway_command(self.config.port))
        self.wait_for(["gateway"])
        self.base_url = (self._children["gateway"].ready_line() or "").split()[-1]
        # Clients know this port: it is the same in the gateway's next lives, whichever it has chosen in this one.
        self._children["gateway"].command = self._gateway_command(urlsplit(self.base_url).port or self.config.port)

    def _gateway_command(self, port: int) -> list[str]:
        return command_line(
            "gateway", *self._pool_arguments(), "--host", self.config.host, "--port", str(port),
            "--served-model-name", self.config.served_model_name, *_options(self.config.admission),
        )  # fmt: skip

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
        assert self.logs is not None
        self._children[name] = Child(name, command, self.logs.new_log(name), env)

    def wait_for(self, names: list[str]) -> None:
        """Until these have started; raises UserError for one that ends instead, or takes too long."""
        deadline = time.monotonic() + self.config.start_timeout_s
        missing = list(names)
        with tqdm(total=len(names), desc=f"starting {names[-1]}", unit="part", leave=False) as bar:
            while missing:
                for name in [name for name in missing if self._has_started(name)]:
                    missing.remove(name)
                    bar.update()
                if missing and time.monotonic() > deadline:
                    raise UserError(f"{', '.join(missing)} did not start within {self.config.start_timeout_s:.0f} s")
                if self._stop.wait(LOOK_INTERVAL_S):
                    raise KeyboardInterrupt

    def _has_started(self, name: str) -> bool:
        if self.is_ready(name):
            return True
        if not self._children[name].is_running:
            raise UserError(f"{name} did not start: {self._children[name].error_line()}")
        return False

    def _end_children(self) -> None:
        """The gateway first, so that no request meets a dying instance."""
        for child in reversed(list(self._children.values())):
            child.terminate()
        by_s = time.monotonic() + GRACE_S
        for child in reversed(list(self._children.values())):
            child.end(grace_s=by_s - time.monotonic())

    def _remove_run_dir(self) -> None:
        """Sockets, configurations and the secret; and the logs, unless they are to be kept."""
        if self.logs is None or self.logs.path != self.run_dir or not self.keeps_logs:
            shutil.rmtree(self.run_dir, ignore_errors=True)
            return
        for path in self.run_dir.iterdir():
            if path.suffix != ".log":
                path.unlink(missing_ok=True)


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
