"""The suite catches seeded bugs: a copy of the package with one of them fails its tests."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mutations
import pytest
from mutations import MUTATIONS, Mutation

import jax_flashmla

pytestmark = pytest.mark.mutation

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(jax_flashmla.__file__).resolve().parent


def copy_of_package(folder):
    """A copy without the compiled extension, if there is one: no test here calls a kernel."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    return Path(shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignored))


def run(folder, tests):
    """Runs tests with the package in the folder: pytest's exit code, report and output."""
    report = folder / "report.json"
    # This run's own options, and which of several workers it is, are not for that one.
    env = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    # Wrong numbers are as wrong when they are computed slowly, and compile faster.
    env |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", mutations.__file__, folder, report]
        + [str(Path("tests", test)) for test in tests],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    # Without a report the program itself failed, whose exit code says nothing.
    assert report.exists(), done.stdout
    result = json.loads(report.read_text(encoding="utf-8"))
    copies = {str(path) for path in (folder / PACKAGE.name).rglob("*.py")}
    assert str(folder / PACKAGE.name / "__init__.py") in result["files"]
    assert copies.issuperset(result["files"]), "another package than the copy was tested"
    return done.returncode, result, done.stdout


def test_same_tests_pass_without_a_mutation(tmp_path):
    tests = sorted({mutation.test for mutation in MUTATIONS})
    copy_of_package(tmp_path)
    code, result, output = run(tmp_path, tests)
    assert code == pytest.ExitCode.OK, output
    assert result["passed"] == len(tests) and not result["failures"], output


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_caught(mutation, tmp_path):
    mutation.apply(copy_of_package(tmp_path))
    code, result, output = run(tmp_path, [mutation.test])
    assert code != pytest.ExitCode.OK, f"{mutation.test} does not notice: {mutation.name}"
    # Neither a test that is not there any more nor one that cannot be imported.
    assert code == pytest.ExitCode.TESTS_FAILED, output
    # Caught by a result that is wrong, not by a crash.
    assert [kind for _, kind in result["failures"]] == ["AssertionError"], output


def test_mutations_do_not_rot(tmp_path):
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    (tmp_path / "a.py").write_text("x = 1\ny = 1\n", encoding="utf-8")
    for old in ("z", "1"):  # not there, and there twice
        with pytest.raises(ValueError, match="occurs [02] times in a.py"):
            Mutation("gone", "a.py", old, "2", "test").apply(tmp_path)
