"""Fuzzes every public function and all commands, and writes what it found as Markdown.

    JAX_PLATFORMS=cpu python results/reliability/fuzz.py --cases 500 --lines 300 > fuzzing.md
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import command_fuzzing  # noqa: E402
import fuzzing  # noqa: E402
import hypothesis  # noqa: E402
import jax  # noqa: E402

from jaxrobust import __version__  # noqa: E402


def main() -> None:
    """Fuzzes, and prints a table of the functions and a list of what is wrong."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cases", type=int, default=500, help="calls of each function")
    options.add_argument("--lines", type=int, default=300, help="command lines")
    options.add_argument("--seed", type=int, default=0, help="of the draws")
    options.add_argument("--only", nargs="*", default=list(fuzzing.CASES), help="functions")
    asked = options.parse_args()
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    start, faults, rows = time.monotonic(), [], []
    for name in asked.only:
        outcomes = fuzz(name, asked.cases, asked.seed)
        found = sorted({fault for fault in outcomes if fault is not None})
        rows.append(f"| `{name}` | {len(outcomes)} | {len(found)} |")
        faults += found
        print(f"{name}: {len(found)} faults", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        of_lines = [command_fuzzing.fault_of(line)
                    for line in command_fuzzing.lines(asked.seed, asked.lines)]
    faults += filter(None, of_lines)
    print("\n".join([
        "# Fuzzing", "",
        f"    python results/reliability/fuzz.py --cases {asked.cases} --lines {asked.lines} "
        f"--seed {asked.seed}", "",
        f"jaxrobust {__version__}, JAX {jax.__version__}, hypothesis {hypothesis.__version__}, "
        f"{jax.default_backend()}; {time.monotonic() - start:.0f} s.", "",
        f"Functions: {len(rows)}, each with {asked.cases} drawn calls, or all there are. "
        f"Command lines: {asked.lines}, with "
        f"{sum(map(bool, of_lines))} faults. Faults in all: {len(faults)}.", "",
        *(f"- {fault}" for fault in faults), *([""] if faults else []),
        "| Function | Calls | Faults |", "|---|---|---|", *rows]))


def fuzz(name: str, number: int, seed: int) -> list[str | None]:
    """What is wrong with each of some drawn calls of a function."""
    outcomes: list[str | None] = []
    known: dict[tuple[str, str], str | None] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=number, deadline=None, database=None,
                         phases=[hypothesis.Phase.generate],
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(fuzzing.spoilt_calls(name))
    def draw(call):
        argument, spoilt = call
        if (argument, spoilt.what) not in known:
            known[argument, spoilt.what] = fuzzing.fault_of(name, argument, spoilt)
        outcomes.append(known[argument, spoilt.what])

    draw()
    return outcomes


if __name__ == "__main__":
    main()
