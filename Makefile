# make demo: the whole method on the embedded agents. make test, make lint: the tests and the linter;
# make format: fix what the linter can fix. make clean removes .venv, make clean-runs the results.
# All set up .venv if it is missing. The experiments are scripts: experiments/README.md.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test lint format clean clean-runs

demo: .venv/.installed
	$(PY) generate_rollouts.py
	$(PY) train_value.py
	$(PY) search.py
	$(PY) evaluate.py
	$(PY) -m report runs/tiny

test: .venv/.installed-dev
	$(PY) -m pytest -q -n 2 --dist loadfile

lint: .venv/.installed-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

format: .venv/.installed-dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv

clean-runs:
	rm -rf runs

# ---- Set-up ----

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, $(PYTHON) is older;" \
	    "name another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@
