# Everything is installed into .venv; both targets re-run quickly.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test lint types clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m functional_optimodules demo

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -n auto

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy functional_optimodules

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,notebooks,test]'
	touch $@

clean:
	rm -rf $(VENV) build dist
