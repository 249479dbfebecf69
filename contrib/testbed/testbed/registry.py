"""A real registry (CNCF distribution 2.8) that can be stopped, killed and started again."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import TestbedError
from .guard import watch
from .process import last_lines, stop, wait_until
from .roots import Testbed


def free_port(ip: str = "127.0.0.1") -> int:
    """Return a TCP port that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind((ip, 0))
        port: int = listener.getsockname()[1]
        return port


_ACCESS = re.compile(r'^\S+ - \S+ \[[^]]*\] "(\S+) (\S+) [^"]*" (\d{3}) (\d+) ', re.MULTILINE)


@dataclass(frozen=True)
class Access:
    """A request, as a registry's log of accesses has it once it is over."""

    method: str
    path: str
    """With its query."""
    status: int
    sent_bytes: int
    """Of the body."""


class Registry:
    """A registry; a context manager that serves within the block.

    Contents are files under `data_dir` and stay after the block. No TLS and no authentication,
    unless `config` adds them.
    """

    def __init__(
        self,
        testbed: Testbed,
        data_dir: Path,
        *,
        ip: str = "127.0.0.1",
        port: int | None = None,
        enter: Sequence[str] = (),
        deletable: bool = True,
        upstream: str | None = None,
        access_log: bool = False,
        config: Mapping[str, object] | None = None,
    ) -> None:
        """Prepare it; nothing runs yet.

        Args:
            testbed: where the registry's program is.
            data_dir: contents, configuration and `registry.log`.
            ip: where it listens; the caller must be able to connect to it.
            port: where it listens; the same one after a restart. By default a free one, or 5000 if
                it listens elsewhere than on this network namespace's loopback.
            enter: words put before its command, such as `Wan.enter` to run beyond a slow link.
            deletable: whether manifests and blobs can be deleted.
            upstream: the `host:port` of another one, spoken to over plain HTTP, whose images it
                gives and keeps: a pull-through cache.
            access_log: whether it notes requests, for `accesses`.
            config: stanzas of its configuration, such as `auth`, `proxy` or `storage`, put in
                place of the default ones; `http` is merged with the default one.
        """
        if port is None:
            port = 5000 if enter else free_port(ip)
        self.address = f"{ip}:{port}"
        """`host:port`, as in the references of its images."""
        self.log = data_dir / "registry.log"
        self._ip, self._port = ip, port
        self._command = [*enter, *testbed.host_command("docker-registry"), "serve"]
        self._config_file = data_dir / "config.json"
        self._process: subprocess.Popen[bytes] | None = None

        stanzas: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "warn", "accesslog": {"disabled": not access_log}},
            "storage": {
                "filesystem": {"rootdirectory": str(data_dir.absolute() / "data")},
                "delete": {"enabled": deletable},
            },
        }
        if upstream is not None:
            stanzas["proxy"] = {"remoteurl": f"http://{upstream}"}
        stanzas.update(config or {})
        http = (config or {}).get("http", {})
        stanzas["http"] = {"addr": self.address, "secret": "testbed"}
        if isinstance(http, dict):
            stanzas["http"] |= http
        data_dir.mkdir(parents=True, exist_ok=True)
        self._config_file.write_text(json.dumps(stanzas, indent=1))  # JSON is YAML

    @property
    def running(self) -> bool:
        """Whether the registry's process runs."""
        return self._process is not None and self._process.poll() is None

    def accesses(self) -> list[Access]:
        """Return the requests that it has noted since it was first started, by their ends."""
        text = self.log.read_text(errors="replace")
        return [
            Access(method, path, int(status), int(sent_bytes))
            for method, path, status, sent_bytes in _ACCESS.findall(text)
        ]

    def start(self, timeout_s: float = 20) -> None:
        """Start it, and return when it accepts connections.

        Raises:
            TestbedError: it ended, or does not accept any within `timeout_s`.
        """
        if self.running:
            raise TestbedError(f"the registry at {self.address} is running already")
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*self._command, str(self._config_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"OTEL_TRACES_EXPORTER": "none", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            )

        watch(process.pid)

        def accepts() -> bool:
            if process.poll() is not None:
                raise TestbedError(f"the registry ended; its log:\n{last_lines(self.log)}")
            try:
                socket.create_connection((self._ip, self._port), timeout=1).close()
            except OSError:
                return False
            return True

        try:
            wait_until(accepts, f"a registry at {self.address}", timeout_s)
        except BaseException:
            stop(process)
            raise
        self._process = process

    def stop(self) -> None:
        """End it in good order: connections are closed, later ones refused."""
        if self._process is not None:
            stop(self._process)
            self._process = None

    def kill(self) -> None:
        """End it at once, in the middle of whatever it is sending."""
        if self._process is not None:
            self._process.kill()
            stop(self._process)
            self._process = None

    def freeze(self) -> None:
        """Stop it answering without closing a connection, until `thaw`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on after `freeze`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Registry:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.thaw()  # a frozen process would not see the SIGTERM
        self.stop()
