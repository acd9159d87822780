"""Faults on purpose: do the tests notice?

    python tests/mutate.py --count=100 --seed=0 --jobs=4

Draws places in the code by chance, and changes each in a copy of the project: a number, an operator, a comparison, a
condition, a keyword argument left out, a call left out. Then the tests that should see it run, until one fails. What no
test noticed is printed.
"""

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = {  # the tests that should see a change in a file, the likeliest first
    "model.py": "model loop sample devices train learning tools",
    "train.py": "loop train saving learning faults ranks devices tools",
    "prepare.py": "prepare texts learning saving faults readme",
    "sample.py": "sample chat tools devices demo",
    "plumbing/bins.py": "train loop texts saving faults learning",
    "plumbing/baselines.py": "learning texts prepare",
    "plumbing/card.py": "tools evaluate",
    "plumbing/chat.py": "chat sample",
    "plumbing/checkpoint.py": "train saving faults ranks tools devices",
    "plumbing/devices.py": "devices train sample tools",
    "plumbing/files.py": "saving prepare faults devices",
    "plumbing/generation.py": "model sample devices",
    "plumbing/hub.py": "prepare sample readme",
    "plumbing/memory.py": "memory",
    "plumbing/metrics.py": "loop train saving tools learning ranks",
    "plumbing/pretrained.py": "model sample train tools faults",
    "plumbing/python_docs.py": "texts readme",
    "plumbing/ranks.py": "ranks loop train faults saving",
    "plumbing/settings.py": "settings train sample saving fuzz ranks",
    "plumbing/pieces.py": "texts",
    "plumbing/shards.py": "prepare faults saving tools",
    "plumbing/sources.py": "prepare texts faults readme",
    "tools/evaluate.py": "evaluate",
    "tools/tasks.py": "evaluate",
}
OTHER = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def changes(node):
    """The ways to change one place, as pieces of code that replace it."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1 if isinstance(node.value, int) else node.value * 2 or 1.0)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        yield ast.Compare(node.left, [OTHER[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in OTHER:
        yield ast.BinOp(node.left, OTHER[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(OTHER[type(node.op)](), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Call):
        for keyword in (keyword for keyword in node.keywords if keyword.arg != "strict"):  # it only looks for mistakes
            yield ast.Call(node.func, node.args, [other for other in node.keywords if other is not keyword])
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Constant(...)


def mutants(file):
    """(file, line, what stood there, what stands there now, the whole text) for every place and change."""
    text = (ROOT / file).read_text()
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree, skipped = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign | ast.arg | ast.FunctionDef) and getattr(node, "annotation", None):
            skipped.update(map(id, ast.walk(node.annotation)))  # types say, and do not do
        if isinstance(node, ast.JoinedStr):
            skipped.update(map(id, ast.walk(node)))  # the wording of messages
    for node in ast.walk(tree):
        if id(node) in skipped or not hasattr(node, "lineno"):
            continue
        start, end = (starts[line - 1] + column for line, column in (
            (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)))  # fmt: skip
        for change in changes(node):
            new = ast.unparse(ast.fix_missing_locations(change))
            new = f"({new})" if isinstance(node, ast.BinOp | ast.BoolOp | ast.Compare) else new
            content = text.encode()
            yield file, node.lineno, content[start:end].decode(), new, content[:start] + new.encode() + content[end:]


def unnoticed(base, kinds, mutant):
    """Run the tests on a changed copy, the quick ones first; whether all of them pass."""
    file, line, old, new, content = mutant
    tests = [f"tests/test_{name}.py" for name in TESTS[file].split()]
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(base, f"{folder}/project")
        Path(copy, file).write_bytes(content)
        for which in kinds:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", which, f"--basetemp={folder}/tests", *tests]
            try:
                env = os.environ | {"FORKED": "1", "OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=900)
            except subprocess.TimeoutExpired:
                by = "the tests never ended"
                break
            if done.returncode not in (0, 5):  # 5: there are no such tests
                by = next((part for part in done.stdout.splitlines() if part.startswith(("FAILED", "ERROR"))), "")
                break
        else:
            by = None
    old, new = (" ".join(part.split())[:70] for part in (old, new))
    print(f"{file}:{line}  {old}  ->  {new}\n    {by or 'UNNOTICED'}", flush=True)
    return by is None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=list(TESTS), metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="leave out the slow tests")
    settings = parser.parse_args()
    kinds = ["not slow"] if settings.quick else ["not slow", "slow"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    everywhere = [mutant for file in settings.only for mutant in mutants(file)]
    drawn = random.Random(settings.seed).sample(everywhere, min(settings.count, len(everywhere)))
    print(f"{len(everywhere)} places and changes, of which {len(drawn)} are tried")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(settings.jobs) as pool:
        without = shutil.ignore_patterns(".git", ".venv", "out", "python-docs")
        base = shutil.copytree(ROOT, f"{folder}/base", ignore=without)
        missed = sum(pool.map(partial(unnoticed, base, kinds), drawn))
    print(f"{len(drawn) - missed} of {len(drawn)} were noticed, {1 - missed / len(drawn):.0%}")


if __name__ == "__main__":
    main()
