# What .ci/run and a person run alike.
PYTHON ?= python

.PHONY: check format lint types test slow readme notebooks notebooks-test claims benchmarks constraints

check: lint types test

format:
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

types:
	pyright

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow

readme:  # the README's table of variants, from the registry
	$(PYTHON) -m variants --markdown README.md

notebooks:  # executes the sources and keeps the outputs beside them
	$(PYTHON) -m notebooks

notebooks-test:  # executes them and keeps nothing; a table with times
	$(PYTHON) -m pytest -m notebooks -n 0 tests/test_notebooks.py

claims:  # the ledger, from the notebooks' results and conf/experiment
	$(PYTHON) -m notebooks --claims > docs/claims.md

# what the page of benchmarks is made of; a quiet machine, an hour or so
SHEETS ?= runs/benchmarks
MEASURED = allocation analysis compare init loss memory packed quantization startup step sweep

benchmarks:  # docs/benchmarks.md: every benchmark beside PEFT, and the page of what they said
	mkdir -p $(SHEETS)
	set -e; for name in $(MEASURED); do \
	  $(PYTHON) -m benchmarks.$$name --json $(SHEETS)/$$name.json; done
	$(PYTHON) -m benchmarks.sheet $(SHEETS)

constraints:  # one file for CPU and CUDA machines: docs/adr/0003
	uv pip compile --universal --python-version 3.11 --extra quant --extra report --extra joblib --extra slurm --extra ray --extra digits --extra notebooks --extra dev pyproject.toml -o constraints.txt
