"""Started by the tests: one serving instance in a process of its own. usage: instance_process.py CONFIG.json"""

import signal
import sys
import threading
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

from megatron_distkv.launch.serve import serve  # noqa: E402

from megatron_distkv.config.base import load_config  # noqa: E402
from megatron_distkv.config.instance import InstanceConfig  # noqa: E402

stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
serve(load_config(InstanceConfig, Path(sys.argv[1])), stop)
