# `make demo`: the whole method on the embedded agents. `make test`: the tests. Both set up .venv where it is missing.
PYTHON ?= python3

.PHONY: demo test clean

demo: .venv/.installed
	.venv/bin/python generate_rollouts.py
	.venv/bin/python train_value.py
	.venv/bin/python search.py
	.venv/bin/python evaluate.py

test: .venv/.installed
	.venv/bin/python -m pytest -q tests

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is older; name another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs
