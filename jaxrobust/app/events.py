"""Writes event files for TensorBoard, at once and in this thread.

``tensorboardX.SummaryWriter`` leaves that to another thread: an error there, such as a full disk,
ends the thread, and the next dozen values then wait for it for ever.
"""

import pathlib
import time
from collections.abc import Mapping

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxrobust.app import files


class Events:
    """An event file in a folder; the values of steps from ``first_step`` on replace older ones."""

    def __init__(self, folder: pathlib.Path, first_step: int):
        self._folder = folder
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
            self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a step."""
        with files.writing(self._folder):
            for name, value in values.items():
                self._write(Event(step=step, summary=summary.scalar(name, value)))
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        with files.writing(self._folder):
            self._writer.close()

    def _write(self, event):
        event.wall_time = time.time()
        self._writer.write_event(event)
