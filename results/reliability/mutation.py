"""Mutates a module and counts the changes that its fast tests notice; see mutation.md.

    pip install cosmic-ray
    nice -n 15 python results/reliability/mutation.py geometry --folder ../mutation

A run that was stopped is resumed. The numbers printed are of what was run so far.
"""

import argparse
import ast
import collections
import os
import pathlib
import random
import shlex
import shutil
import sqlite3
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
TESTS = {
    "losses": ("losses", "softmax", "class_weights", "geometry", "validate"),
    "centroids": ("centroids", "losses", "validate"),
    "geometry": ("geometry", "validate"),
    "curvature": ("curvature", "eager"),
    "probes": ("probes", "curvature"),
}


def prepare(module: str, folder: pathlib.Path) -> None:
    """A copy of the last commit, and a session of Cosmic Ray in it."""
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "-C", ROOT, "archive", "HEAD"], check=True,
                             stdout=subprocess.PIPE)
    subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
    tests = [f"tests/core/{name}_test.py" for name in TESTS[module]]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-m", "not slow", "--tb=line",
               "-p", "no:cacheprovider", *tests, f"jaxrobust/{module}.py"]
    shutil.copy(folder / "jaxrobust" / f"{module}.py", folder / "original.py")
    (folder / "session.toml").write_text(
        f'[cosmic-ray]\nmodule-path = "jaxrobust/{module}.py"\ntimeout = 400.0\n'
        f"excluded-modules = []\ntest-command = '''{shlex.join(command)}'''\n"
        '[cosmic-ray.distributor]\nname = "local"\n')
    subprocess.run(["cosmic-ray", "init", "session.toml", "session.sqlite"], cwd=folder, check=True)


def sample(module: str, folder: pathlib.Path, size: int, seed: int) -> None:
    """Leaves ``size`` mutants at random. Of an operator's replacements at one place one is drawn;
    left out are those of annotations, and stars and slashes of signatures and calls."""
    nodes = list(ast.walk(ast.parse((folder / "original.py").read_text())))
    annotations = {part for node in nodes for name in ("annotation", "returns")
                   if isinstance(getattr(node, name, None), ast.AST)
                   for part in ast.walk(getattr(node, name))}
    # Where an operator stands: between what is left and right of it.
    operators = [((node.left.end_lineno, node.left.end_col_offset),
                  (node.right.lineno, node.right.col_offset))
                 for node in nodes if isinstance(node, ast.BinOp) and node not in annotations]
    places = collections.defaultdict(list)
    with sqlite3.connect(folder / "session.sqlite") as session:
        for job, operator, line, column in session.execute(
                "select job_id, operator_name, start_pos_row, start_pos_col from mutation_specs "
                "order by start_pos_row, start_pos_col, operator_name, occurrence"):
            kind = operator.split("/")[1].split("_")[0]
            if kind == "ReplaceBinaryOperator" and not any(
                    start <= (line, column) < end for start, end in operators):
                continue
            alike = kind in ("ReplaceBinaryOperator", "ReplaceComparisonOperator")
            places[(kind, line, column) if alike else job].append(job)
        draw = random.Random(seed)
        chosen = [draw.choice(jobs) for jobs in places.values()]
        kept = set(draw.sample(chosen, min(size, len(chosen))))
        print(f"{len(kept)} of {len(places)} places", flush=True)
        everything = [job for job, in session.execute("select job_id from work_items")]
        session.executemany(
            "insert into work_results (job_id, worker_outcome, output) values (?, 'SKIPPED', '')",
            [(job,) for job in everything if job not in kept])


def report(folder: pathlib.Path) -> None:
    with sqlite3.connect(folder / "session.sqlite") as session:
        found = session.execute(
            "select test_outcome, diff from work_results where worker_outcome != 'SKIPPED'"
        ).fetchall()
    print(collections.Counter(outcome for outcome, _ in found))
    for outcome, diff in found:
        if outcome == "SURVIVED":
            print(*(line for line in diff.splitlines()[2:] if line[:1] in "+-@"), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module", choices=TESTS)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--sample", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder = (asked.folder / asked.module).absolute()
    if not folder.exists():
        prepare(asked.module, folder)
        sample(asked.module, folder, asked.sample, asked.seed)
    environment = os.environ | {
        "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    try:
        # Without the mutant that a stop has left.
        shutil.copy(folder / "original.py", folder / "jaxrobust" / f"{asked.module}.py")
        subprocess.run(["cosmic-ray", "exec", "session.toml", "session.sqlite"], cwd=folder,
                       env=environment, check=True)
    finally:
        report(folder)


if __name__ == "__main__":
    main()
