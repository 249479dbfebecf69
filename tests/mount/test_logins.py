"""A mount's login: where secrets may not be seen, and a password that is changed meanwhile."""

import base64
import json
import os
import sys
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.faults import FaultServer, behave, redirect, status
from tests.images import zstd_chunked
from tests.mount.mounting import Mounts, error_of, lazyfs, read_at
from tests.mount.published import MIB, checkpoint_files, publish

FILES = checkpoint_files(8 * MIB)
DATA = FILES["checkpoint/pages-1.img"]
SECRET = "s3cr3t-of-the-test"
_HELPER = f"""#!{sys.executable}
import json, os, sys
seen = os.path.join(os.path.dirname(__file__), "seen")
with open(seen, "ab") as file:
    for name in ("cmdline", "environ"):
        file.write(open("/proc/self/" + name, "rb").read() + b"\\n")
    file.write(open("/proc/%d/cmdline" % os.getppid(), "rb").read() + b"\\n")
with open(os.path.join(os.path.dirname(__file__), "answer")) as file:
    print(file.read())
sys.stderr.write("{SECRET}")
raise SystemExit(0 if sys.stdin.read() else 1)
"""


@pytest.fixture
def server() -> FaultServer:
    """A registry that wants a token, and gives it for a password or an identity token."""
    server = FaultServer()
    server.auth, server.password, server.token_life_s = "bearer", ("user", SECRET), 0.001
    server.identity_token = SECRET
    return server


@pytest.fixture
def helper(tmp_path: Path) -> Path:
    """A directory with a helper, and an auth file that names it."""
    directory = tmp_path / "bin"
    directory.mkdir()
    path = directory / "docker-credential-test"
    path.write_text(_HELPER)
    path.chmod(0o755)
    (directory / "config.json").write_text(json.dumps({"credsStore": "test"}))
    return directory


def answer(helper: Path, username: str, secret: str) -> None:
    (helper / "answer").write_text(json.dumps({"Username": username, "Secret": secret}))


@pytest.mark.parametrize("username", ["user", "<token>"])
def test_secrets_are_seen_nowhere(
    server: FaultServer, mounts: Mounts, helper: Path, username: str
) -> None:
    environ = {**os.environ, "PATH": f"{helper}:{os.environ['PATH']}"}
    environ["DOCKER_CONFIG"] = str(helper)
    with server, FaultServer() as storage:
        reference = publish(server, zstd_chunked(FILES))
        answer(helper, username, SECRET)
        for path, item in server.resources.items():
            if "/blobs/" in path:
                storage.resources["/" + path.rpartition("/")[2]] = item

        def move(exchange: object) -> None:
            path = exchange.seen.path.rpartition("/")[2]  # type: ignore[attr-defined]
            target = f"{storage.url}/{path}?X-Signature={SECRET}"
            redirect(target)(exchange)  # type: ignore[arg-type]

        server.script("/blobs/", behave, move, move, move, move)
        mount = mounts.mount(reference, "-vv", env=environ)
        assert read_at(mount / "pages-1.img", MIB, 4096) == DATA[MIB : MIB + 4096]
        asked = server.count("/token")
        assert asked, "the helper's word was needed"
        seen = [mount.said.out, mount.said.err, json.dumps(mount.status())]
        seen += [str(path.read_bytes()) for path in Path(f"/proc/{mount.pid}").glob("cmdline")]
        seen += [str((helper / "seen").read_bytes())]
        storage.always("/", status(403))
        answer(helper, username, "wr0ng" + SECRET)
        server.forgive()
        error = error_of(lambda: read_at(mount / "pages-1.img", 4 * MIB, 4096))
        assert error == "EIO"
        answer(helper, username, SECRET)
        assert (mount / "pages-1.img").read_bytes() == DATA
        seen += [json.dumps(mount.status()), mounts.log()]
        answer(helper, username, "wr0ng" + SECRET)
        for words in (["ls", "-vv"], ["inspect", "-vv"]):
            done = lazyfs(*mounts.options(*words), reference, env=environ)
            assert done.code == 3
            assert "docker-credential-test" in done.err
            seen += [done.out, done.err]
        assert mount.umount().code == 0
    assert "401" in seen[-1]
    for text in seen:
        assert SECRET not in text
        assert base64.b64encode(f"user:{SECRET}".encode()).decode() not in text
        assert "Bearer " not in text
        assert "token-1" not in text
    mounts.tolerate_log("are not good for it")


def test_options_of_the_command_line(server: FaultServer, mounts: Mounts, tmp_path: Path) -> None:
    """A file named relative to where the command was given, and TLS that is not checked."""
    authority = Authority(tmp_path / "authority")
    context = authority.context(authority.server("127.0.0.1"))
    tls = FaultServer(tls=context)
    tls.auth, tls.password = server.auth, server.password
    with tls:
        reference = publish(tls, zstd_chunked(FILES))
        auth = base64.b64encode(f"user:{SECRET}".encode()).decode()
        (tmp_path / "login.json").write_text(json.dumps({"auths": {tls.host: {"auth": auth}}}))
        refused = mounts.refuse(reference, "--authfile=login.json", cwd=tmp_path)
        assert refused.code == 3
        mount = mounts.mount(reference, "--authfile=login.json", "--tls-verify=false", cwd=tmp_path)
        mounts.expect_log("its TLS certificate is not checked")
        assert (mount / "pages-1.img").read_bytes() == DATA
        assert mount.umount().code == 0
