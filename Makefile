# `make demo` and `make test` need Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
AUDIT := .venv-audit
AT_LOWEST := $(LOWEST)/bin/python -m pytest \
	-W "ignore:jax.array_ref is deprecated:DeprecationWarning" \
	-W "ignore:jax.ArrayRef is deprecated:DeprecationWarning"
PEERS := tests/paper/bench_peers_test.py \
	tests/app/suite_test.py::test_a_users_own_model_is_tested_like_a_run \
	tests/core/attacks_test.py::test_the_examples_of_the_docs_run

.PHONY: demo test test-all test-lowest coverage lint audit clean

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

# Branches too, of the library and of the application; commands that tests start are counted.
coverage: $(VENV)/installed
	$(VENV)/bin/python -m coverage erase
	$(VENV)/bin/python -m coverage run -m pytest
	$(VENV)/bin/python -m coverage combine --quiet
	$(VENV)/bin/python -m coverage report --include="jaxrobust/*" --omit="jaxrobust/app/*" \
		--fail-under=95
	$(VENV)/bin/python -m coverage report --include="jaxrobust/app/*" --fail-under=90

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# What is installed: its licences, and its known vulnerabilities, which are asked for over the
# network. Without an answer this fails; so it is not part of `.ci/run`.
audit: $(VENV)/installed
	$(VENV)/bin/python .ci/licences.py
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit==2.10.1
	$(VENV)/bin/python -m pip freeze --exclude-editable > $(AUDIT)/installed.txt
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement $(AUDIT)/installed.txt

clean:
	rm -rf $(VENV) $(LOWEST) $(AUDIT) build *.egg-info
