# `make demo` and `make test` need Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest

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

# The core at the lower bounds in pyproject.toml. The warnings are caused by Flax 0.12.0, which looks
# for names that JAX 0.8.0 has changed.
$(LOWEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -c "import tomllib; print(*(bound.replace('>=', '==') for bound in \
		tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']), sep='\n')" \
		> $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet -e '.[app,weights,dev]' -c $(LOWEST)/lowest.txt
	touch $@

test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python -m pytest tests/core -m "not slow" \
		-W "ignore:jax.array_ref is deprecated:DeprecationWarning" \
		-W "ignore:jax.ArrayRef is deprecated:DeprecationWarning"

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) $(LOWEST) build *.egg-info
