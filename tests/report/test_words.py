import msgspec
from msgspec.structs import replace

from lazyfs.checkpoint.trace import Fetch, Phase, Read, Recording, Trace
from lazyfs.report.analysis import analyse
from lazyfs.report.waits import Causes, Wait
from lazyfs.report.words import (
    brief,
    circumstances,
    figures,
    hints,
    main_cause,
    sentence,
    told,
    why,
)
from tests.report.recordings import lazy_restore

MIB = 1 << 20
READ = Read(0, 0, 4096, 100.0, 200.0, "fault", True)
FETCH = Fetch(0, 0, 4 * MIB, 100.0, 150.0, 190.0, "demand", 1)


def test_a_sentence_says_what_happened() -> None:
    found = analyse(lazy_restore(64))
    spent = replace(found.budget, start_ms=384.0, criu_ms=4.0, waiting_ms=620.0, rest_ms=412.4)
    assert sentence(replace(found, budget=spent, end_ms=1420.0)) == (
        "First response after 1.42 s (port 8080 answered): 0.38 s until the mount answered, "
        "0.62 s waiting for 7 faults and 1 read, 0.41 s other work."
    )
    assert sentence(analyse(lazy_restore(64).hint())).startswith(
        "A hint: 3.1 MiB in 51 ranges of 2 files "
    )


def test_only_an_answer_is_a_first_response() -> None:
    def begins(until: str) -> str:
        return sentence(analyse(msgspec.structs.replace(lazy_restore(64), until=until)))[:45]

    assert begins("check.sh succeeded") == "First response after 1.27 s (check.sh succeed"
    assert begins("port 80 answered over HTTP").startswith("First response after 1.27 s (port 80")
    assert begins("the mount ended") == "1.27 s recorded (the mount ended): 0.38 s unt"
    assert begins("10 s passed").startswith("1.27 s recorded (10 s passed): ")


def test_figures_tell_how_much() -> None:
    strip = {figure.name: figure.value for figure in figures(analyse(lazy_restore(64)))}
    assert list(strip) == ["needed", "fetched", "image", "link", "asked for", "waited", "slowest"]
    assert (strip["needed"], strip["image"]) == ("3.1 MiB", "74.0 MiB")
    assert strip["link"] == "118 MB/s"


def test_times_are_written_as_short_as_they_may_be() -> None:
    assert [brief(time) for time in (0.0, 0.31, 9.96, 412.4, 1420)] == [
        "0 ms",
        "0.3 ms",
        "10 ms",
        "412 ms",
        "1.42 s",
    ]


def test_a_wait_says_what_it_was_for() -> None:
    causes = Causes(first_byte_ms=50, transfer_ms=40, answering_ms=10)
    wait = Wait(READ, causes, 190.0, FETCH, True, 0)
    assert why(wait) == (
        "fetched only when it was asked for; 50 ms until the first byte; "
        "40 ms for 4.0 MiB to come; 10 ms from there to the answer"
    )
    assert main_cause(wait) == "first byte"
    ahead = Fetch(0, 0, 4 * MIB, 100.0, 150.0, 190.0, "readahead", 3)
    wait = Wait(READ, Causes(behind_ms=80, decoding_ms=20), 190.0, ahead, False, 9 * MIB)
    assert why(wait) == (
        "on its way already (readahead); 80 ms behind 9.0 MiB of others; "
        "20 ms to decode, check and store it; had at attempt 3"
    )
    assert main_cause(wait) == "behind others"
    assert "another daemon" in why(Wait(READ, Causes(), 190.0, None, False, 0))
    assert "from the cache" in why(Wait(READ, Causes(), None, None, False, 0))


def test_hints_come_from_what_was_seen() -> None:
    found = analyse(lazy_restore(256))
    first, second = hints(found)
    assert "This trace names them" in first
    assert "the link, which carried 118 MB/s" in second
    assert hints(analyse(lazy_restore(64).hint())) == []
    slow = replace(found, budget=replace(found.budget, start_ms=5000.0), end_ms=5200.0)
    assert "with what `lazyfs warm`" in hints(slow)[0]
    slow.phases[0] = Phase("lazyfs: start", 0.0, 4500.0)
    assert "4.50 s of them before lazyfs itself was loaded" in hints(slow)[0]


def test_what_is_to_be_done_next_depends_on_how_it_was_recorded() -> None:
    exact, usual = (analyse(lazy_restore(256, as_usual=usual)) for usual in (False, True))
    assert "lazyfs trace push" in hints(exact)[0]
    assert "quicker" in circumstances(exact)
    assert "--record wrote" in circumstances(analyse(exact.trace.hint()))
    assert "there was no trace. Record one" in hints(usual)[0]
    assert "were behind other transfers" in hints(usual)[1]
    assert circumstances(usual).startswith("Without a trace. Memory")
    usual.recording.figures["trace"] = {"needed_bytes": 3 * MIB}
    assert "the trace, of 3.0 MiB, did not foretell" in hints(usual)[0]
    assert circumstances(usual).startswith("With a trace of 3.0 MiB. ")
    usual.recording.figures["trace"] = {"needed_bytes": "<b>"}
    assert circumstances(usual).startswith("Without")


def test_of_what_nobody_waited_for_nothing_is_to_be_done() -> None:
    assert hints(analyse(Trace(recording=Recording()))) == []


def test_a_terminal_gets_the_sentence_the_longest_waits_and_the_hints() -> None:
    lines = told(analyse(lazy_restore(256)))
    assert lines[0].startswith("First response")
    assert sum(line.startswith("   ") for line in lines) == 5
    assert "checkpoint/pages-1.img at " in lines[3]


def test_that_events_were_too_many_is_said() -> None:
    found = analyse(lazy_restore(64))
    few = analyse(lazy_restore(64, dropped=7))
    assert told(few)[-1].startswith("7 events left out, too many to be recorded or of files that ")
    assert "too many" not in told(found)[-1]
