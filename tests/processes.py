"""Runs commands in one process of a job: ``python processes.py DEVICES EPOCH COMMAND [+ COMMAND]``.

The process has so many CPU devices, and dies after training epoch EPOCH, as a killed one does (0:
it lives). Commands are those of ``python -m experiments``, separated by a plus sign.
"""

import os
import sys

devices, last_epoch, *words = sys.argv[1:]
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
os.environ["JAX_PLATFORMS"] = "cpu"

from experiments import __main__ as cli  # noqa: E402
from experiments import training  # noqa: E402

KILLED = 9
record = training._Running.record


def record_until_killed(self, row, *rest):
    record(self, row, *rest)
    if row["epoch"] == int(last_epoch):
        os._exit(KILLED)


training._Running.record = record_until_killed
command: list[str] = []
for word in [*words, "+"]:
    if word != "+":
        command.append(word)
        continue
    sys.argv = ["experiments", *command]
    cli.main()
    command = []
