# Everything a person does with a clone. `make demo` and `make test` need nothing installed
# before them but make, git and a Debian 12/13 or Ubuntu machine; they install the rest.

.PHONY: demo test check setup testbed fuzz bench faults engines soak format clean

demo: setup testbed
	@.venv/bin/python contrib/demo/demo.py

# What is about networks, or about engines, takes its time, and has a command of its own: make
# faults, make engines.
WEATHER = tests/real/faults tests/real/test_mirrors.py tests/real/test_weather.py
ENGINES = tests/real/engines

test: setup testbed check
	.venv/bin/python -m pytest -n 2 --dist=loadfile --ignore=tests/mount --ignore=tests/real
	.venv/bin/python -m pytest -n 2 --dist=loadfile tests/mount tests/real \
		$(patsubst %,--ignore=%,$(WEATHER) $(ENGINES))

check: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

setup:
	@contrib/setup.sh

testbed: setup
	@contrib/testbed/build.sh || test "$$?" = 3

# All parsers, each for FUZZ_SECONDS; what is new goes to tests/fuzz/corpus.
FUZZ_SECONDS ?= 300
fuzz: setup
	@mkdir -p build
	.venv/bin/python -m tests.fuzz all -max_total_time=$(FUZZ_SECONDS) -timeout=20 \
		-rss_limit_mb=2048 -max_len=65536 -artifact_prefix=build/

bench: setup testbed
	.venv/bin/python bench/peers.py
	.venv/bin/python bench/read_path.py
	.venv/bin/python bench/decoding.py

# The fault suite: real mounts and restores in bad weather, registries and mirrors that go and come
# back, a hundred mounts behind a cache, daemons killed at random moments. FAULTS is
# passed on to pytest: --kills 200 --criu-kills 20 (twenty minutes and more), --faults-json FILE.
faults: setup testbed
	.venv/bin/python -m pytest $(WEATHER) $(FAULTS)

# Unmodified engines restore stubs: Podman with runc and crun, containerd, CRI-O's calls.
engines: setup testbed
	.venv/bin/python -m pytest $(ENGINES)

# SOAK is passed on: --minutes 2, --mounts 10, --json FILE.
soak: setup testbed
	.venv/bin/python bench/soak.py $(SOAK)

format: setup
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
