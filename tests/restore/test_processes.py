import os
import select
import subprocess
import sys

from lazyfs.restore.processes import descendants, has_ended

_ORPHANS = """
import os, signal, subprocess, sys, time
from lazyfs.restore.processes import adopt_orphans, descendants, kill_descendants
adopt_orphans()
spared = subprocess.Popen(["sleep", "60"])
subprocess.run(["sh", "-c", "setsid sleep 60 & setsid sh -c 'sleep 60 & sleep 60' & exit 0"])
while len(descendants(os.getpid())) < 5:
    time.sleep(0.005)
assert kill_descendants({spared.pid}) == []
assert descendants(os.getpid()) == [spared.pid], descendants(os.getpid())
assert descendants(os.getpid(), {spared.pid}) == []
spared.kill()
spared.wait()
"""
_DIES_WITH_US = """
import os, subprocess, sys
from lazyfs.restore.processes import die_with_parent
us = os.getpid()
child = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: die_with_parent(us))
print(child.pid, flush=True)
sys.stdin.read()
os._exit(0)
"""


def test_orphans_in_sessions_of_their_own_are_found_and_killed_but_the_spared_one() -> None:
    subprocess.run([sys.executable, "-c", _ORPHANS], check=True, timeout=60)


def test_a_program_dies_with_who_started_it() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _DIES_WITH_US], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    pidfd = os.pidfd_open(pid)
    assert pid in descendants(parent.pid)
    parent.communicate(timeout=20)

    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)


def test_a_process_has_ended_when_it_waits_to_be_reaped_or_is_gone() -> None:
    assert not has_ended(os.getpid())
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(process.pid)
    assert has_ended(process.pid)
