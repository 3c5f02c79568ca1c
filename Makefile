# `make train` is the quick start; `make help` lists everything.
#
#   PYTHON  a Python >= 3.12 to make the environment with (otherwise one is looked for)
#   VENV    where the environment is (.venv)
#   ARGS    options for the target, e.g. make train ARGS='--iters 50'

VENV ?= .venv
export PYTHON
RUN := $(VENV)/bin/python

.PHONY: help train compare evaluate test bench rehearse lint types docs clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1 - /p' Makefile
	@echo "  ARGS='...' passes options on, e.g. make train ARGS=--help"

# The stamp is written last, so an interrupted installation is made again.
$(VENV)/.installed: setup.py megatron_mhc/compat.py
	@tools/make_env.sh $(VENV)

train: $(VENV)/.installed ## train a small GPT with mHC on real text and plot its losses
	@$(RUN) tools/quickstart.py train $(ARGS)

compare: $(VENV)/.installed ## train standard, hc and mhc from two seeds and plot them together
	@$(RUN) tools/quickstart.py compare $(ARGS)

# What others evaluate and fine-tune with is installed when it is first wanted.
$(VENV)/.evaluate: $(VENV)/.installed
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[evaluate]' $(PIP_ARGS)
	@touch $@

evaluate: $(VENV)/.evaluate ## train, export to Hugging Face and run lm-evaluation-harness on it
	@PYTHON=$(RUN) examples/evaluate.sh $(ARGS)

# In the order that tests/conftest.py gives the files.
test: $(VENV)/.installed ## run the tests, two files at a time (-n 0: one)
	@$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.installed ## time the mHC ops on a GPU, beside torch and every installed peer
	@$(RUN) tools/bench/bench.py $(ARGS)

rehearse: $(VENV)/.installed ## drive every step of tools/bench/gpu_check.sh without a GPU
	@PYTHON=$(RUN) tools/bench/gpu_check.sh --rehearse $(ARGS)

lint: $(VENV)/.installed ## check style, imports and spelling
	@$(RUN) -m ruff check . $(ARGS)
	@$(RUN) -m ruff format --check .
	@$(RUN) -m codespell_lib

# What builds the site is installed when it is first wanted.
$(VENV)/.docs: $(VENV)/.installed
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[docs]' $(PIP_ARGS)
	@touch $@

# Not --quiet, under which --strict counts no warnings.
docs: $(VENV)/.docs ## build the guides and the API reference as a site, in site/
	@$(RUN) -m mkdocs build --strict $(ARGS)

types: $(VENV)/.installed ## check types (mypy; pyproject.toml says how strictly which room)
	@$(RUN) -m mypy $(ARGS)

clean: ## remove caches, builds and the runs of train and compare (not .venv)
	rm -rf build dist *.egg-info runs site .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -exec rm -rf {} +
