# The two commands of the README are `make demo` and `make test`. Both make .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python

.PHONY: demo test lint models data clean

$(VENV)/.installed: requirements.txt
	@echo "Installing requirements.txt into $(VENV) (once, a few minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN) -m pip install --quiet --requirement requirements.txt
	touch $@

demo: $(VENV)/.installed  ## the whole loop, live, at a small size
	$(BIN) utils/demo.py

test: $(VENV)/.installed
	$(BIN) -m pytest

lint: $(VENV)/.installed
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .

models: $(VENV)/.installed  ## rebuild policy-mini and judge-mini (about 45 minutes on 2 cores); resumes when interrupted
	$(BIN) utils/build_embedded_models.py --overwrite

data: $(VENV)/.installed  ## rebuild the held-out problems, the pairs and their scores
	$(BIN) utils/build_problems.py --overwrite
	$(BIN) utils/build_synthetic_dataset.py --overwrite
	$(BIN) reward_model/evaluate_steps.py --overwrite

clean:  ## remove what runs wrote, keep what is committed and the installation
	git clean -fdXq -e '!$(VENV)' -- saved_model logs evaluation data models
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
