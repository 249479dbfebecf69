"""Put a lazyfs together that needs no Python, and no particular C library, where it runs.

    python build.py DEST

DEST becomes a tree of an interpreter, its standard library, lazyfs and what it depends on, all
shared libraries of these, and the ld.so that loads them; `bin/` has a launcher for each of the
project's scripts. Nothing in it knows where it lies, so it may be moved, copied and mounted
elsewhere; it needs a kernel of the same architecture, and /bin/sh.

Decides what is left out: parts of the standard library that lazyfs never uses, and modules in C
whose libraries are large. The build ends by importing all of lazyfs within the tree, by its own
launcher, so that leaving out too much is an error here and not there.

Assumes a glibc of 2.34 or later (name resolution by files and DNS is part of it from then on),
and that `ldd` is there. It runs in the Python that it copies; what is installed there decides the
versions. Everything is read from `importlib.metadata` and this clone: no network.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import ctypes
import filecmp
import hashlib
import importlib
import importlib.metadata
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
CLONE = HERE.parent.parent
_LEAST_GLIBC = (2, 34)
_LEFT_OUT = (
    *("config-*", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "tkinter"),
    *("turtledemo", "turtle.py", "venv", "site-packages", "dist-packages", "distutils", "curses"),
    *("dbm", "sqlite3", "__phello__", "_pyrepl", "idle_test", "__pycache__", "*.pyc", "*.a"),
    *("_test*", "_ctypes_test*", "xx*", "_xxtest*", "_tkinter*", "_sqlite3*", "_curses*", "_dbm*"),
    *("_gdbm*", "readline*", "nis.*", "ossaudiodev*", "audioop*", "spwd*", "_crypt.*"),
    *("_lsprof*", "EXTERNALLY-MANAGED", "sitecustomize.py"),
)
_UNUSED_SUFFIXES = (".pyc", ".pyi", ".pyx", ".pxd", ".c", ".h")
_OPENED_AT_RUN_TIME = ("libgcc_s.so.1",)
"""What glibc opens by name when a thread ends early, so that ldd does not tell of it."""
_MAIN = '''"""What the launchers in ../bin start: a script by its name."""

import importlib
import sys

_SCRIPTS = {scripts!r}

sys.argv[:2] = sys.argv[1:2]
module, _, function = _SCRIPTS[sys.argv[0]].partition(":")
getattr(importlib.import_module(module), function)()
'''
_SELF_CHECK = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import lazyfs, lazyfs.ground.errors
for found in pkgutil.walk_packages(lazyfs.__path__, "lazyfs."):
    if found.name == "lazyfs.__main__":
        continue
    try:
        importlib.import_module(found.name)
    except lazyfs.ground.errors.UsageError:
        if not found.name.startswith("lazyfs.report."):  # what draws wants an extra, plotly
            raise
import encodings.idna, encodings.utf_8
files = [getattr(module, "__file__", None) or sys.argv[2] for module in sys.modules.values()]
strays = [path for path in files if not path.startswith(sys.argv[2])]
with open("/proc/self/maps") as maps:
    mapped = {line.rstrip().split(maxsplit=5)[5] for line in maps if ".so" in line}
strays += [path for path in mapped if not path.startswith(sys.argv[2])]
sys.exit(f"loaded from elsewhere: {strays}" if strays else 0)
"""


def main() -> None:
    """Build in a directory beside DEST and rename it when it is complete."""
    parser = argparse.ArgumentParser(prog="build.sh", description="Build a portable lazyfs.")
    parser.add_argument("dest", metavar="DEST", type=Path, help="a directory that is not there yet")
    dest: Path = parser.parse_args().dest.absolute()
    if dest.exists() and any(dest.iterdir()):
        fail(f"{dest} is there and not empty")
    _check_libc()
    dest.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        build(building)
        building.rename(dest)
    finally:
        if building.exists():
            _make_writable(building)
            shutil.rmtree(building)
    report(dest)


def build(tree: Path) -> None:
    """Fill an empty directory."""
    project = tomllib.loads((CLONE / "pyproject.toml").read_text())
    copy_interpreter(tree)
    copy_packages(tree / "app", project["project"]["dependencies"])
    shutil.copytree(CLONE / "lazyfs", tree / "app" / "lazyfs", ignore=_ignore("__pycache__"))
    shutil.copy(CLONE / "LICENSE", tree)
    copy_libraries(tree)
    strip(tree)
    write_scripts(tree, project)
    compile_all(tree)
    (tree / "VERSION").write_text(f"{version_of(tree)}\n")
    for path in sorted(tree.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() or path.stat().st_mode & 0o100 else 0o444)
    tree.chmod(0o755)
    check(tree)
    tree.chmod(0o555)


def copy_interpreter(tree: Path) -> None:
    """Copy the program and the standard library to where it looks for that: ../lib beside it."""
    name = f"python{sysconfig.get_python_version()}"
    program = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    (tree / "python" / "bin").mkdir(parents=True)
    shutil.copy(program, tree / "python" / "bin" / name)
    library = tree / "python" / "lib" / name
    source = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(source, library, ignore=_ignore(*_LEFT_OUT))
    dynamic = Path(sysconfig.get_config_var("DESTSHARED"))
    if not (library / "lib-dynload").is_dir() and dynamic.is_dir():
        shutil.copytree(dynamic, library / "lib-dynload", ignore=_ignore(*_LEFT_OUT))


def copy_packages(app: Path, requirements: list[str]) -> None:
    """Copy what lazyfs requires, and what that requires, with their metadata and licenses."""
    for distribution in closure(requirements):
        for file in distribution.files or ():
            parts = file.parts
            if ".." in parts or file.is_absolute() or file.suffix in _UNUSED_SUFFIXES:
                continue
            if {"tests", "test", "__pycache__"} & set(parts[:-1]):
                continue
            if "/".join(parts).startswith("zstandard/_cffi."):  # PyPy's
                continue
            if parts[-1] in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
                continue  # where and by whom it was installed
            target = app.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), target)


def closure(requirements: list[str]) -> list[importlib.metadata.Distribution]:
    """Return the distributions that requirements lead to on this machine, each once."""
    parse = _requirement_parser()
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    left = [(text, "") for text in requirements]
    while left:
        text, of_extra = left.pop()
        requirement = parse(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        try:
            distribution = found.get(name) or importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            fail(f"{requirement} is not installed in {sys.prefix}")
        if not requirement.specifier.contains(distribution.version, prereleases=True):
            fail(f"{requirement} is wanted, {distribution.version} is installed in {sys.prefix}")
        found[name] = distribution
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                left += [(each, extra) for each in distribution.requires or ()]
    return [found[name] for name in sorted(found)]


def copy_libraries(tree: Path) -> None:
    """Copy all shared libraries that the tree's programs and modules need, and their ld.so."""
    libraries = tree / "lib"
    libraries.mkdir()
    copied: set[Path] = set()
    for path in [*_elf_files(tree), *_opened_at_run_time()]:
        for needed in _needed(path):
            if needed not in copied and not needed.is_relative_to(tree):
                copied.add(needed)
                target = libraries / needed.name
                if target.exists() and not filecmp.cmp(needed, target, shallow=False):
                    fail(f"there are two different {needed.name}: one of them is {needed}")
                shutil.copy(needed.resolve(), target)
    for path in _opened_at_run_time():
        shutil.copy(path, libraries / path.name)
    loaders = [path for path in copied if path.name.startswith("ld-linux")]
    if len(loaders) != 1:
        fail(f"expected one ld.so, found {loaders}")
    # By the name that a process started through it has in ps and top.
    (libraries / loaders[0].name).rename(libraries / "lazyfs")
    (libraries / "lazyfs").chmod(0o755)


def strip(tree: Path) -> None:
    """Remove what only a debugger reads, where this machine has the tool for it."""
    if program := shutil.which("strip"):
        run([program, "--strip-debug", *_elf_files(tree)])


def write_scripts(tree: Path, project: dict[str, Any]) -> None:
    """Write a launcher for each script in Python, and copy those that are something else."""
    scripts: dict[str, str] = project["project"]["scripts"]
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    shared: dict[str, str] = wheel.get("shared-scripts", {})
    folder = tree / "bin"
    folder.mkdir()
    template = (HERE / "launcher.sh").read_text()
    python = f"python{sysconfig.get_python_version()}"
    for name in scripts:
        text = template.replace("@NAME@", name).replace("@PYTHON@", python)
        (folder / name).write_text(text)
    for source, name in shared.items():
        shutil.copy(CLONE / source, folder / name)
    for path in folder.iterdir():
        path.chmod(0o755)
    (tree / "app" / "__main__.py").write_text(_MAIN.replace("{scripts!r}", repr(scripts)))


def compile_all(tree: Path) -> None:
    """Compile all modules, to be believed without a look at their sources' times."""
    done = compileall.compile_dir(
        tree,
        maxlevels=99,
        quiet=2,
        stripdir=str(tree),
        workers=0,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    if not done:
        fail("some modules cannot be compiled")


def version_of(tree: Path) -> str:
    """Return lazyfs's version and a digest of all that is in the tree: one name, one content."""
    digest = hashlib.sha256()
    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    found = re.search(r'__version__ = "([^"]+)"', (CLONE / "lazyfs" / "__init__.py").read_text())
    return f"{found[1] if found else '0'}-{digest.hexdigest()[:12]}"


def check(tree: Path) -> None:
    """Import everything within the tree, and see that nothing came from outside it.

    The tree is moved for that, so that a path which was written into it is found out.
    """
    with tempfile.TemporaryDirectory(dir=tree.parent) as elsewhere:
        moved = Path(elsewhere) / "lazyfs with spaces"
        tree.rename(moved)
        try:
            python = next((moved / "python" / "bin").iterdir())
            words: list[str | Path] = [moved / "lib" / "lazyfs", "--inhibit-cache"]
            words += ["--library-path", moved / "lib", "--argv0", python, python]
            words += ["-I", "-S", "-B", "-c", _SELF_CHECK]
            run([*words, moved / "app", moved])
            run([moved / "bin" / "lazyfs", "--version"])
        finally:
            moved.rename(tree)


def report(tree: Path) -> None:
    """Say how large it is, and how long it takes to say its version beside the original."""
    total = sum(path.lstat().st_size for path in tree.rglob("*") if not path.is_dir())
    print(f"{tree}: {total / 1e6:.1f} MB, Python {sys.version.split()[0]}")
    for path in (tree / "bin" / "lazyfs", Path(sys.executable).parent / "lazyfs"):
        if path.exists() and (taken := [_seconds([path, "--version"]) for _ in range(5)]):
            print(f"{path} --version: {min(taken) * 1e3:.0f} ms (the least of five)")


def run(words: Iterable[str | Path]) -> str:
    """Run a program with an environment in which much is wrong; fail if it does."""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONHOME": "/nonexistent"}
    command = [str(word) for word in words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        fail(f"{' '.join(command)}\nfailed: {done.stdout}{done.stderr}")
    return done.stdout


def fail(message: str) -> NoReturn:
    """End with a message."""
    sys.exit(f"build.sh: {message}")


def _seconds(words: list[str | Path]) -> float:
    started = time.perf_counter()
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def _requirement_parser() -> Any:
    """Return `packaging`'s class of requirements; every pip has a copy of it."""
    for name in ("packaging", "pip._vendor.packaging"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(f"{name}.requirements").Requirement
    fail(f"neither packaging nor pip is installed in {sys.prefix}")


def _check_libc() -> None:
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "another").partition(" ")
    numbers = tuple(int(part) for part in version.split(".") if part.isdigit())
    if name != "glibc" or numbers < _LEAST_GLIBC:
        fail(f"build on a machine with glibc 2.34 or later; this one has {name} {version}")


def _ignore(*patterns: str) -> Any:
    return shutil.ignore_patterns(*patterns)


def _elf_files(tree: Path) -> Iterator[Path]:
    for path in sorted(tree.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield path


def _needed(path: Path) -> Iterator[Path]:
    """Yield the shared libraries that ldd finds for a file, ld.so among them."""
    for line in run(["ldd", path]).splitlines():
        words = line.split()
        if "not found" in line:
            fail(f"{path} needs {words[0]}, which is not found")
        if "=>" in words:
            yield Path(words[2])
        elif words[0].startswith("/"):
            yield Path(words[0])


def _opened_at_run_time() -> list[Path]:
    """Return where the dynamic linker finds what is opened by name."""
    for name in _OPENED_AT_RUN_TIME:
        ctypes.CDLL(name)
    maps = Path("/proc/self/maps").read_text()
    mapped = {line.split()[-1] for line in maps.splitlines()}
    return [Path(path) for path in mapped if Path(path).name in _OPENED_AT_RUN_TIME]


def _make_writable(tree: Path) -> None:
    tree.chmod(0o755)
    for path in tree.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


if __name__ == "__main__":
    main()
