# `make demo` and `make test` are the two commands; each makes its own environment first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow bench docs pictures clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/unvanish demo

test: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

slow: .venv/installed
	$(BIN)/python -m pytest -m slow --timeout 1800

# The peers (wandb, TensorBoard, Lightning) are needed only here.
bench: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python bench/overhead.py

docs: .venv/installed
	$(BIN)/python -m pytest tests/test_docs.py

pictures: .venv/installed
	$(BIN)/python docs/pictures.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist
