# `make demo` and `make test` need Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
AT_LOWEST := $(LOWEST)/bin/python -m pytest \
	-W "ignore:jax.array_ref is deprecated:DeprecationWarning" \
	-W "ignore:jax.ArrayRef is deprecated:DeprecationWarning"
PEERS := tests/paper/bench_peers_test.py \
	tests/app/suite_test.py::test_a_users_own_model_is_tested_like_a_run \
	tests/core/attacks_test.py::test_the_examples_of_the_docs_run

.PHONY: demo test test-all test-lowest lint clean

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/jaxrobust demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m "not slow"

# The core's tests with all of XLA's optimizations, as users have them.
test-all: $(VENV)/installed
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(VENV)/bin/python -m pytest tests/core jaxrobust
	$(VENV)/bin/python -m pytest tests/app tests/paper

# The core at the lower bounds in pyproject.toml, and beside PyTorch and Foolbox, which no other
# environment has. The warnings are caused by Flax 0.12.0, which looks for names that JAX 0.8.0 has
# changed.
$(LOWEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -c "import tomllib; \
		project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*(bound.replace('>=', '==') for bound in project['dependencies'] \
		+ project['optional-dependencies']['bench']), sep='\n')" > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet -e '.[app,weights,bench,dev]' -c $(LOWEST)/lowest.txt
	touch $@

test-lowest: $(LOWEST)/installed
	$(AT_LOWEST) tests/core -m "not slow"
	$(AT_LOWEST) $(PEERS)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(LOWEST) build *.egg-info
