PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := hf_orthograd examples benchmarks tests docs setup.py
STUBS := out/stubs

.PHONY: demo test test-oldest bench docs quality style

# torch comes first: with it in place no other package pulls in a build with CUDA
$(BIN)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# one thread, whatever the machine has: so that the table is the same, and a core that others use does not hold up the run
demo: $(BIN)/.installed  # the main job on the embedded default
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process 1 examples/unlearn_asr.py

test: $(BIN)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 10

OLDEST ?= .venv-oldest

# the lower bounds of setup.py, in an environment of their own; what starts processes is left to the tested versions
test-oldest:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet -c constraints-oldest.txt -e ".[dev]"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -p no:cacheprovider \
		--ignore tests/test_distributed.py --ignore tests/test_sharding.py --ignore tests/test_precision.py \
		--ignore tests/test_examples.py --ignore tests/test_image_example.py

bench: $(BIN)/.installed  # hours on a small machine; skips what is measured already
	$(BIN)/pip install --quiet -c constraints.txt -e ".[bench]"
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/step_cost.py --methods graddiff two_pass gram func loop torchjd opacus \
		--memory_methods graddiff two_pass gram func torchjd

docs: $(BIN)/.installed  # the site, in out/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# signatures are checked in stubs, which have no bodies and no private names
quality: $(BIN)/.installed  # check only
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/python docs/_sentences.py README.md CONTRIBUTING.md CHANGELOG.md docs
	rm -rf $(STUBS) && $(BIN)/stubgen -q -p hf_orthograd -o $(STUBS)
	cd $(STUBS) && $(CURDIR)/$(BIN)/mypy -p hf_orthograd --ignore-missing-imports --disallow-untyped-defs --disallow-incomplete-defs \
		--python-executable $(CURDIR)/$(BIN)/python

style: $(BIN)/.installed  # fix
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
