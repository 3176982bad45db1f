# `make demo` and `make test` need Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test test-all lint clean

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/jaxrobust demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m "not slow"

test-all: $(VENV)/installed
	$(VENV)/bin/python -m pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info
