"""Kills runs at random moments, resumes them, and compares them with runs never stopped; see
faults.md.

    nice -n 15 python results/reliability/faults.py --points 500 --folder ../faults

A trial draws its settings and up to four kills from its seed, ends the run, and must find the bits
of one that was never killed: everything in the last checkpoint, every line of the log but for the
seconds, and the best epoch. A call that was stopped is resumed; --trial SEED repeats one trial.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
# Read when JAX is imported. Each process below makes a backend of its own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402

from jaxrobust import checkpoints, data  # noqa: E402
from jaxrobust.app import config, files, program, provenance, run_folder, trainer  # noqa: E402
from jaxrobust.app.execution import Execution, Feed  # noqa: E402
from jaxrobust.app.recipe import RECIPES  # noqa: E402
from jaxrobust.parallel import make_layout  # noqa: E402

# 64 images in batches of 16: epochs of 4 updates.
TINY = dataclasses.replace(
    RECIPES["digits"].rows["robust"], train_size=64, epochs=4, width=2, num_features=4,
    batch_size=16, optimizer=config.OptimizerConfig(
        learning_rate=0.02, schedule="cosine", clip_norm=1.0))
KINDS = ("time", "file operation", "writing of a checkpoint")
LIMIT = 300.0
"""Seconds after which a process is taken to hang."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a run, or of several in one program."""

    checkpoint_every: int
    checkpoint_steps: int | None
    input: str
    steps_per_call: int
    runs: int
    diverging: bool  # the last of the runs
    processes: int
    tensorboard: bool

    def uninterrupted(self) -> "Settings":
        """Those of the run to compare with, without what must not change a bit. Several runs in a
        program whose calls make more updates differ in the last bits, interrupted or not."""
        return dataclasses.replace(
            self, tensorboard=False, input="stream" if self.processes > 1 else "resident",
            # A run that diverges ends with the checkpoint before.
            checkpoint_steps=self.checkpoint_steps if self.diverging else None)


@dataclasses.dataclass(frozen=True)
class Kill:
    """A moment: the time since training began as a share of that of a whole run; the number of a
    file operation; or that of a checkpoint and a delay in seconds."""

    kind: str
    number: int
    share: float


def draw(seed: int) -> tuple[Settings, list[Kill]]:
    """The settings and kills of a trial."""
    random_ = random.Random(seed)
    processes = 2 if random_.random() < 0.1 else 1
    source = "stream" if processes > 1 else random_.choice(("resident", "stream"))
    together = source == "resident"
    runs = random_.choice((1, 2, 3)) if together else 1
    settings = Settings(
        random_.choice((1, 2, 3)), random_.choice((None, 1, 2, 3)), source,
        random_.choice((1, 2)) if together else 1, runs,
        runs > 1 and random_.random() < 0.4 or random_.random() < 0.05, processes,
        random_.random() < 0.2)
    kills = [Kill(random_.choice(KINDS), random_.randint(1, 60), random_.random())
             for _ in range(random_.randint(1, 4))]
    return settings, kills


def configs_of(settings: Settings) -> list[config.RunConfig]:
    """The configurations of the runs."""
    base = dataclasses.replace(TINY, checkpoint_every=settings.checkpoint_every)
    runs = [dataclasses.replace(base, seed=seed) for seed in range(settings.runs)]
    if settings.diverging:
        runs[-1] = config.with_settings(runs[-1], {"robust.lam": 3e38, "robust.alpha": 3e38})
    return runs


# --- processes -------------------------------------------------------------------------------


def start(work, log: pathlib.Path) -> int:
    """Runs a function in a process, forked before JAX has a backend; returns its number."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def train(settings: Settings, folder: pathlib.Path, digits, process: int, port: int,
          operation: int | None) -> None:
    """Trains, or resumes, the runs of a trial; dies before a file operation, if one is given."""
    execution = Execution() if settings.processes == 1 else Execution(
        coordinator=f"127.0.0.1:{port}", num_processes=settings.processes, process_id=process)
    layout = execution.start()
    if operation is not None:
        sys.addaudithook(_killing(folder, operation))
    trainer.train_together(
        configs_of(settings), digits, places(settings, folder), resume=True,
        tensorboard=settings.tensorboard, layout=layout,
        feed=Feed(settings.input, settings.steps_per_call, settings.checkpoint_steps))
    if settings.processes == 1:
        write_digest(settings, folder, digits)


def places(settings: Settings, folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders of the runs."""
    return [folder / f"run{number}" for number in range(settings.runs)]


def _killing(folder, operation):
    """Kills this process before so many operations on files in a folder."""
    left = [operation]

    def hook(event, arguments):
        changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree") or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (
                os.O_WRONLY | os.O_RDWR))
        if changes and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def write_digest(settings: Settings, folder: pathlib.Path, digits) -> None:
    """Writes what must be equal to the bit: of each run the log, the end and the checkpoint."""
    found = []
    for run, place in zip(configs_of(settings), places(settings, folder), strict=True):
        state = program.initial_state(run, digits, make_layout("jit"))
        like = {"state": state, "best": checkpoints.to_host(state)}
        with contextlib.closing(checkpoints.open_checkpoints(
                run_folder.checkpoints_path(place), keep=2)) as manager:
            stored = checkpoints.restore_checkpoint(manager, like, need_facts=True)
        saved = stored and {
            "step": stored.step, "updates": stored.facts["updates"],
            "epochs": _timeless(stored.facts["epochs"]),
            "leaves": {jax.tree_util.keystr(path): _sha256(leaf) for path, leaf in
                       jax.tree_util.tree_leaves_with_path(checkpoints.to_host(stored.state))}}
        diverged = run_folder.read_facts(place, "diverged")
        found.append({
            "log": _timeless(run_folder.read_epochs(place)), "checkpoint": saved,
            "done": run_folder.read_facts(place, "done"),
            "diverged": diverged and diverged["epoch"]})
    (folder / "digest.json").write_text(json.dumps(found))


def _timeless(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def _sha256(array):
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()


class Trial:
    """The processes of one trial in a folder, one after the other."""

    def __init__(self, settings: Settings, folder: pathlib.Path, digits):
        self.settings, self.folder, self._digits = settings, folder, digits
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def run(self, kill: Kill | None = None, seconds: float = 0.0) -> tuple[bool, float]:
        """Runs the job to its end or to a kill; whether it was killed, and the seconds of training.

        ``seconds`` are those of a whole training.
        """
        settings, log = self.settings, self.folder / "output.txt"
        port = _free_port() if settings.processes > 1 else 0
        operation = kill.number if kill is not None and kill.kind == KINDS[1] else None
        jobs = {start(lambda process=process: train(
            settings, self.folder, self._digits, process, port, operation if process == 0 else None
        ), log) for process in range(settings.processes)}
        moment = None if kill is None or operation else self._moments(kill, seconds)
        began, first, killed = time.monotonic(), None, False
        while jobs:
            now = time.monotonic()
            if first is None and all(run_folder.is_begun(place) or run_folder.is_trained(place)
                                     for place in places(settings, self.folder)):
                first = now
            due = moment is not None and first is not None and next(moment)
            for job in list(jobs):
                ended, status = os.waitpid(job, os.WNOHANG)
                if ended:
                    jobs.remove(job)
                    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                        killed = due = True
                    elif status and not killed:
                        self._stop(jobs)
                        raise AssertionError(f"A process failed: {log.read_text()[-4000:]}")
            if due:
                killed = killed or bool(jobs)
                self._stop(jobs)
            if now - began > LIMIT:
                self._stop(jobs)
                raise AssertionError(f"A process hangs: {log.read_text()[-4000:]}")
            time.sleep(0.0005)
        return killed, time.monotonic() - (first or began)

    def _moments(self, kill: Kill, seconds: float):
        """Yields whether the moment of a kill has come."""
        begun, seen, times = time.monotonic(), set(), None
        while True:
            now = time.monotonic()
            if kill.kind == KINDS[0]:
                yield now - begun >= kill.share * seconds
                continue
            if times is None:
                for place in places(self.settings, self.folder):
                    seen.update(path for path in run_folder.checkpoints_path(place).glob("*tmp*"))
                if len(seen) > kill.number % 4:
                    times = now
            yield times is not None and now - times >= 0.05 * kill.share

    def _stop(self, jobs) -> None:
        for job in jobs:
            os.kill(job, signal.SIGKILL)

    def digest(self) -> list:
        """What the runs ended with."""
        path = self.folder / "digest.json"
        if not path.exists():
            number = start(lambda: write_digest(self.settings, self.folder, self._digits),
                           self.folder / "output.txt")
            assert os.waitpid(number, 0)[1] == 0, (self.folder / "output.txt").read_text()[-4000:]
        return json.loads(path.read_text())


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Trials:
    """Trials in a folder, beside the runs never interrupted that they are compared with."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(self.folder / "compiled"))
        self._digits = data.load_dataset("digits")
        self._whole: dict[Settings, tuple[list, float]] = {}

    def _expected(self, settings: Settings) -> tuple[list, float]:
        plain = settings.uninterrupted()
        if plain not in self._whole:
            whole = Trial(plain, self.folder / "whole", self._digits)
            _, seconds = whole.run()
            self._whole[plain] = whole.digest(), seconds
        return self._whole[plain]

    def run(self, seed: int) -> dict:
        """Runs a trial; returns its settings, the kills that came, and what differs."""
        settings, kills = draw(seed)
        facts = {"seed": seed, "settings": dataclasses.asdict(settings)}
        expected, seconds = self._expected(settings)
        trial = Trial(settings, self.folder / "trial", self._digits)
        came = []
        for kill in kills:
            if not trial.run(kill, seconds)[0]:
                break
            came.append(kill.kind)
        else:
            trial.run()
        found = trial.digest()
        differ = [f"run {number}: {name}" for number, (one, other) in enumerate(
            zip(found, expected, strict=True)) for name in one if one[name] != other[name]]
        return facts | {"kills": came, "differ": differ}


# --- table -----------------------------------------------------------------------------------


def table(rows: list[dict]) -> list[str]:
    """Lines of a table: the kills by settings and moment, and how many trials differ."""
    groups = [
        ("all", lambda _: True),
        *((f"{name} = {value}", lambda row, name=name, value=value: row["settings"][name] == value)
          for name in ("checkpoint_every", "checkpoint_steps", "input", "steps_per_call", "runs",
                       "diverging", "processes", "tensorboard")
          for value in sorted({row["settings"][name] for row in rows}, key=str))]
    lines = ["| Trials | Number | Kills | " + " | ".join(f"at a {kind}" for kind in KINDS)
             + " | Not the same bits |", "|---|---:|---:|" + "---:|" * len(KINDS) + "---:|"]
    for name, belongs in groups:
        some = [row for row in rows if belongs(row)]
        kinds = collections.Counter(kind for row in some for kind in row["kills"])
        lines.append(f"| {name} | {len(some)} | {kinds.total()} | " + " | ".join(
            str(kinds[kind]) for kind in KINDS)
            + f" | {sum(bool(row['differ']) for row in some)} |")
    return lines


def page(rows: list[dict], facts: dict) -> str:
    """The page of the results."""
    kills = sum(len(row["kills"]) for row in rows)
    differ = [row["seed"] for row in rows if row["differ"]]
    return "\n".join([
        "# Runs killed at random moments", "",
        f"{kills} kills by SIGKILL in {len(rows)} trials. Of the trials, {len(differ)} did not end "
        "with the bits of a run never stopped" + (f": seeds {differ}." if differ else "."), "",
        *(__doc__.split("\n\n")[2].strip().splitlines()), "", *table(rows), "",
        f"`{facts['command']}`, commit {facts['commit']}, {facts['hardware']}, JAX "
        f"{facts['versions']['jax']}, {facts['started']}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--points", type=int, default=20, help="kills in all")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--trial", type=int, help="the seed of one trial")
    parser.add_argument("--out", type=pathlib.Path, help="stem of a .jsonl and a .md file")
    asked = parser.parse_args()
    trials, path = Trials(asked.folder), asked.folder / "trials.jsonl"
    if asked.trial is not None:
        print(json.dumps(trials.run(asked.trial), indent=2))
        return
    began, rows = time.monotonic(), files.read_lines(path)
    while sum(len(row["kills"]) for row in rows) < asked.points and (
            time.monotonic() - began < 60 * asked.minutes):
        row = trials.run(len(rows))
        rows.append(row)
        with path.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"{sum(len(row['kills']) for row in rows)} kills, {time.monotonic() - began:.0f} s",
              flush=True)
        if row["differ"]:
            print(f"NOT THE SAME: {json.dumps(row)}", flush=True)
    print("\n".join(table(rows)))
    if asked.out is not None:
        facts = provenance.describe()
        shutil.copy(path, asked.out.with_suffix(".jsonl"))
        files.write_text(asked.out.with_suffix(".md"), page(rows, facts))
    if any(row["differ"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
