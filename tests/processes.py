"""Runs commands in one process of a job: ``python processes.py DEVICES EPOCH COMMAND [+ COMMAND]``.

The process has so many CPU devices, and dies after training epoch EPOCH, as a killed one does (0:
it lives). With -EPOCH, all processes but the first get SIGTERM then, and live on. Commands are
those of ``python -m experiments``, separated by a plus sign.
"""

import os
import signal
import sys
import time

KILLED = 9
HOLDER = ("import fcntl, sys, time; file = open(sys.argv[1], 'r+b'); "
          "fcntl.flock(file, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(600)")
"""A program that locks a file until it is killed."""


def main(devices: str, last_epoch: str, *words: str) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    # After JAX's settings, which it reads when it is imported.
    from experiments import __main__ as cli
    from jaxrobust.app import files, trainer

    record = trainer._Running.record

    def record_until_killed(self, row, *rest):
        record(self, row, *rest)
        if row["epoch"] == -int(last_epoch) and not files.is_writer():
            signal.raise_signal(signal.SIGTERM)
        if row["epoch"] == int(last_epoch):
            # All have come here: none is left waiting for another that is gone.
            files.barrier("kill")
            time.sleep(1)
            os._exit(KILLED)

    trainer._Running.record = record_until_killed
    command: list[str] = []
    for word in [*words, "+"]:
        if word != "+":
            command.append(word)
            continue
        sys.argv = ["experiments/__main__.py", *command]
        cli.main()
        command = []


if __name__ == "__main__":
    main(*sys.argv[1:])
