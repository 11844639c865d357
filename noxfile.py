"""The checks of this repository: `nox` runs all, `nox -s lint` one. CI runs the same sessions.

Each session has an environment of its own. In one that has everything installed: `nox --no-venv --no-install`.
"""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "types", "tests", "docs"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install("ruff>=0.8")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy: the package in strict mode, and tests, scripts and examples."""
    session.install(".[test,dev]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; `nox -s tests -- --slow` also runs those that take minutes."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Run every example and check links, commands and words of the docs."""
    session.install(".[test]")
    session.run("pytest", "-n", "0", "tests/test_docs.py", "tests/test_examples.py", "tests/test_vocabulary.py")


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the default tests and fail if they cover less than setup.cfg says (`coverage:report`)."""
    session.install(".[test]", "pytest-cov>=5")
    session.run("pytest", "--cov", "--cov-report=term", *session.posargs)


@nox.session
def sources(session: nox.Session) -> None:
    """Load models by the libraries of the extras, which the default tests skip if they are not installed."""
    session.install(".[test,onnx,hf,clip,robustbench]")
    session.run(
        "pytest",
        "-n",
        "0",
        "tests/models/test_exported.py",
        "tests/models/test_hugging_face.py",
        "tests/models/test_clip.py",
    )


@nox.session
def faults(session: nox.Session) -> None:
    """Plant each fault of the mutation table and report the tests that find it; takes hours."""
    session.install(".[test]")
    session.run("python", "scripts/tools/mutation_table.py")
