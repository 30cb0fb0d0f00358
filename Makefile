# Two commands for a fresh machine: make compare, make test. Both create .venv and install what they need.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: compare test lint format clean

compare: .venv/installed
	$(BIN)/normprop compare

test: .venv/installed
	$(BIN)/python -m pytest -n 2 -q

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("normprop needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; type: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[recipes,export,dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
