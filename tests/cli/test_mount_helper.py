"""What mount(8)'s words mean to `mount.lazyfs`."""

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.cli.mount_helper import run_helper, split_options, understand, words_of
from lazyfs.ground.errors import LazyfsError

NAMES = st.text(string.ascii_letters + string.digits + "-_", min_size=1)
VALUES = st.text(st.characters(exclude_characters='"', exclude_categories=["Cs"]))


@given(st.lists(st.tuples(NAMES, VALUES)))
def test_options_come_out_as_they_were_put_together(options: list[tuple[str, str]]) -> None:
    text = ",".join(f'{name}="{value}"' for name, value in options)
    assert list(split_options(text)) == [f"{name}={value}" for name, value in options]


@given(st.text())
def test_no_text_is_too_much_for_the_options(text: str) -> None:
    assert all(split_options(text))


def test_what_mount_lazyfs_knows_keeps_its_name_and_the_last_word_counts() -> None:
    options = ["view=criu", "plain-http", "view=image", "cache-dir=/a b", "tls-verify=false"]
    words = words_of(options, is_sloppy=False)
    assert sorted(words) == [
        "--cache-dir=/a b",
        "--plain-http",
        "--tls-verify=false",
        "--view=image",
    ]


def test_what_mount_and_systemd_obey_is_passed_over() -> None:
    options = "rw,noauto,user=nobody,_netdev,nofail,x-systemd.idle-timeout=60,X-y,comment=z,noatime"
    assert words_of(options.split(","), is_sloppy=False) == []


def test_the_last_of_exec_and_noexec_counts() -> None:
    assert words_of(["user", "noexec"], is_sloppy=False) == ["--noexec"]
    assert words_of(["noexec", "exec"], is_sloppy=False) == []


@pytest.mark.parametrize(
    "options",
    ["cachedir=/a", "foreground", "verbose", "help", "source-name=x", "view", "plain-http=1"],
)
def test_what_has_no_meaning_is_refused(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_helper(["./x.tar", str(tmp_path), "-o", options]) == 1
    assert options.partition("=")[0] in capsys.readouterr().err


def test_unknown_options_are_passed_over_by_a_sloppy_call() -> None:
    asked = understand(["./x.tar", "/mnt", "-s", "-o", "rw,cachedir=/a,view=image"])
    assert asked.words == ("--view=image", "--source-name=./x.tar")


def test_a_reference_may_look_like_an_option_of_the_command() -> None:
    asked = understand(["--", "-x.tar", "/mnt"])
    assert asked.reference == "-x.tar"
    assert asked.words == ("--source-name=-x.tar",)


def test_mountinfo_which_all_may_read_is_given_no_signature() -> None:
    asked = understand(["https://store.example/web.tar?X-Signature=secret", "/mnt"])
    assert asked.reference.endswith("secret")
    assert asked.words == ("--source-name=https://store.example/web.tar",)


@pytest.mark.parametrize("words", [[], ["x"], ["x", "y", "z"], ["x", "y", "-t", "ext4"], ["-q"]])
def test_a_call_that_mount_does_not_make_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_helper(words) == 1
    assert capsys.readouterr().err.startswith("mount.lazyfs: ")


def test_what_cannot_be_is_said_before_anything_is_tried() -> None:
    with pytest.raises(LazyfsError, match="unmount it and mount it again"):
        understand(["./x.tar", "/mnt", "-o", "remount,ro"])
    with pytest.raises(LazyfsError, match="nsenter --mount=/proc/1/ns/mnt"):
        understand(["./x.tar", "/mnt", "-N", "/proc/1/ns/mnt"])


def test_help_and_version_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_helper(["--help"]) == 0
    assert run_helper(["-V"]) == 0
    said = capsys.readouterr().out
    assert "Usage: mount.lazyfs REF DIR" in said
    assert "mount.lazyfs 0." in said
