from pathlib import Path

from rich.pretty import pretty_repr

from lazyfs.checkpoint.reference import ArchiveReference
from lazyfs.ground.discreet import Discreet
from lazyfs.transport.credentials import Credentials


class Door(Discreet, frozen=True):
    unprinted = ("key",)
    name: str
    key: str = ""


def test_what_is_not_to_be_printed_is_not() -> None:
    door = Door("back", key="s3cr3t")
    for printed in (repr(door), str(door), f"{door}", f"{[door]}", pretty_repr(door)):
        assert "back" in printed
        assert "s3cr3t" not in printed
    assert repr(door) == "Door(name='back')"


def test_it_counts_all_the_same() -> None:
    assert Door("back", "1") != Door("back", "2")
    assert hash(Door("back", "1")) == hash(Door("back", "1"))


def test_all_secrets_of_a_login_stay_untold() -> None:
    given = Credentials("us3r", "p4ss", Path("/auth.json"), "id3ntity", "r3gistry")
    assert repr(given) == "Credentials(source=PosixPath('/auth.json'))"


def test_an_archive_is_the_same_whatever_its_signature() -> None:
    here, there = (ArchiveReference("https://host/a.tar", query) for query in ("one", "two"))
    assert here == there
    assert hash(here) == hash(there)
