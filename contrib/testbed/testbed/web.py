"""nginx on loopback: a folder served over HTTP, with ranges, or a way to a registry elsewhere."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType

from .errors import TestbedError
from .guard import watch
from .process import last_lines, run, stop, wait_until
from .registry import free_port
from .roots import Testbed

_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


class WebServer:
    """nginx; a context manager that serves within the block.

    `work_dir` is for its configuration and logs; `location` is what its one location says. With
    `tls` it is HTTPS, and who trusts `certificate` trusts it.
    """

    def __init__(
        self, testbed: Testbed, work_dir: Path, location: str, *, tls: bool = False
    ) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        """`host:port`."""
        self.certificate = work_dir.absolute() / "nginx.crt"
        """Its own, self-signed; made as the block is entered."""
        self._command = testbed.host_command("nginx")
        self._openssl = testbed.host_command("openssl") if tls else None
        self._work_dir, self._location = work_dir.absolute(), location
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def of_folder(cls, testbed: Testbed, work_dir: Path, folder: Path) -> WebServer:
        """Return one that serves the files of a folder."""
        return cls(testbed, work_dir, f"root {folder.absolute()};")

    @classmethod
    def before(cls, testbed: Testbed, work_dir: Path, address: str) -> WebServer:
        """Return one that speaks HTTPS for a server that does not, and passes everything on."""
        passing = [f"proxy_pass http://{address};", "proxy_http_version 1.1;"]
        passing += ['proxy_set_header Connection "";', "proxy_set_header Host $http_host;"]
        passing += ["proxy_buffering off;", "proxy_request_buffering off;"]
        passing.append("client_max_body_size 0;")
        return cls(testbed, work_dir, " ".join(passing), tls=True)

    def __enter__(self) -> WebServer:
        self._work_dir.mkdir(parents=True, exist_ok=True)
        work_dir, log = self._work_dir, self._work_dir / "nginx.log"
        pid = work_dir / "nginx.pid"
        pid.unlink(missing_ok=True)
        temporary = " ".join(f"{kind}_temp_path {work_dir}/nginx-{kind};" for kind in _TEMPORARY)
        listen = f"listen {self.address};"
        if self._openssl:
            key = self._make_certificate(self._openssl)
            listen = f"listen {self.address} ssl; ssl_certificate {self.certificate};"
            listen += f" ssl_certificate_key {key};"
        config = work_dir / "nginx.conf"
        config.write_text(
            f"daemon off; master_process off; user root; pid {pid};\n"
            f"events {{}} http {{ access_log off; {temporary}\n"
            f"server {{ {listen} location / {{ {self._location} }} }} }}\n"
        )
        command = [*self._command, "-e", str(log), "-p", str(work_dir), "-c", str(config)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        watch(process.pid)

        def serves() -> bool:
            if process.poll() is not None:
                raise TestbedError(f"nginx ended; its log:\n{last_lines(log)}")
            return pid.exists()

        try:
            wait_until(serves, f"nginx; its log: {log}", 20)
        except BaseException:
            stop(process)
            raise
        self._process = process
        return self

    def _make_certificate(self, openssl: list[str]) -> Path:
        key, config = self._work_dir / "nginx.key", self._work_dir / "openssl.conf"
        config.write_text("[req]\ndistinguished_name = name\n[name]\n")
        host = self.address.partition(":")[0]
        words: list[str | Path] = [
            "-config",
            config,
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "30",
        ]
        words += ["-subj", f"/CN={host}", "-addext", f"subjectAltName=IP:{host}"]
        run([*openssl, "req", "-x509", *words, "-keyout", key, "-out", self.certificate])
        return key

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            stop(self._process)
            self._process = None
