# Everything is installed into .venv, and what the tests compile is kept in .jax_cache: targets re-run quickly.
PYTHON ?= python3
VENV ?= .venv
# A worker that is done takes tests from another, and so compiles little that another has compiled.
PYTEST = $(VENV)/bin/python -m pytest -n auto --dist worksteal

# The compiler for TPUs needs none. It lies where only those tests look: where Python finds it, JAX takes 2 s more to import.
LIBTPU = libtpu==0.0.52; platform_system == 'Linux' and platform_machine == 'x86_64'

.PHONY: demo test check lint types clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m functional_optimodules demo

test: $(VENV)/.installed $(VENV)/.libtpu
	$(PYTEST)

# For the inner loop: lint, types, and the tests that are not marked as slow.
check: lint types
	$(PYTEST) -m "not slow"

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy functional_optimodules

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,notebooks,test]'
	touch $@

$(VENV)/.libtpu: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --target $(VENV)/libtpu "$(LIBTPU)"
	touch $@

clean:
	rm -rf $(VENV) .jax_cache build dist
