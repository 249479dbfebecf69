"""Every parser against bytes that nobody meant: coverage-guided, by atheris.

    python -m tests.fuzz TARGET [libFuzzer's options]     one target, until it is stopped
    make fuzz                                             all of them, five minutes each
    pytest tests/fuzz                                     the kept corpus, then a second each

A target is a function of bytes (`targets.py`); it may return or raise a `LazyfsError`, nothing
else. What fuzzing found worth keeping is in `corpus/TARGET/`, beside the seeds that `seeds.py`
makes of well-formed input.
"""
