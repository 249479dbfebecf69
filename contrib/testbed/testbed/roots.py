"""Where the testbed is on this machine, and how programs of its root are run on the host."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import TestbedError, TestbedMissing

_DEFAULT_CACHE = "/var/cache/lazyfs-testbed"
_BUILD = Path(__file__).resolve().parent.parent / "build.sh"


@dataclass(frozen=True)
class Testbed:
    """A testbed that `build.sh` has built."""

    __test__ = False

    cache: Path

    @classmethod
    def locate(cls, *, privileged: bool = True) -> Testbed:
        """Find the testbed and see that it can work.

        Args:
            privileged: also require root and a kernel that CRIU is content with. Without, only
                what needs neither can be used: a registry, skopeo, images.

        Raises:
            TestbedMissing: it is not built, or this machine cannot run it.
        """
        testbed = cls(Path(os.environ.get("LAZYFS_TESTBED") or _DEFAULT_CACHE).absolute())
        if not (testbed.root / ".lazyfs-testbed").is_file():
            raise TestbedMissing(f"no testbed in {testbed.cache}: run {_BUILD}")
        for name in ("wanlink", "workload"):
            if not (testbed.cache / "bin" / name).is_file():
                raise TestbedMissing(f"the testbed has no {name}: run {_BUILD}")
        if privileged:
            if os.geteuid() != 0:
                raise TestbedMissing("CRIU, mounts and network namespaces need root")
            testbed._check_criu()
        return testbed

    @property
    def root(self) -> Path:
        """The Debian 13 root. Never written to after it was built."""
        return self.cache / "root"

    def program(self, name: str) -> Path:
        """Return a program compiled by build.sh, `workload` say: static, so it runs anywhere."""
        return self.cache / "bin" / name

    def host_command(self, name: str) -> list[str]:
        """Return the words that run a program of the root on the host, to be followed by its own.

        The program is loaded by the root's own ld.so with the root's libraries, and sees the
        host's files: `skopeo`, say, finds no /etc/containers/policy.json here and must be told
        `--insecure-policy`. Not for scripts.

        Raises:
            TestbedError: the root has no such program.
        """
        libraries = self.root / "usr/lib" / f"{platform.machine()}-linux-gnu"
        loaders = sorted((self.root / "usr/lib64").glob("ld-linux-*")) or sorted(
            (self.root / "usr/lib").glob("ld-linux-*")
        )
        for folder in ("usr/bin", "usr/sbin"):
            program = self.root / folder / name
            if program.is_file() and loaders:
                words = [str(loaders[0]), "--library-path", str(libraries), str(program)]
                if name == "criu":  # not the plugins of a CRIU that the host may have
                    words += ["--libdir", str(self.root / "usr/lib/criu")]
                return words
        raise TestbedError(f"the testbed's root has no program {name}")

    def _check_criu(self) -> None:
        try:
            done = subprocess.run(
                [*self.host_command("criu"), "check"],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TestbedMissing(f"CRIU does not run here: {error}") from error
        if done.returncode != 0:
            raise TestbedMissing(f"CRIU cannot work on this kernel: {done.stderr.strip()}")
