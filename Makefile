# make reproduce   run the papers' notebooks and print where the report is
# make publish     write the outputs of that run into the notebooks under nbs/
# make test        check the layout of the code, that notebooks and library are in step, run every test; DEVICE=cuda: what needs a GPU
# make lint        only the layout of the code: ruff, and import-linter for the rooms
# make outputs     which notebooks' outputs are older than their code; RUN=--run runs them and stores what they show
# make lab         open JupyterLab
# make site        build the documentation: notebooks as executed, library, claims, search
# make bench       time the training loop, the store and the imports
# make readme      make the README from nbs/index.ipynb and the published results
#
# Variables: PAPER=ubt      which papers (default: all)     PROFILE=mini   smoke, mini or paper
#            DEVICE=auto    auto, cpu or cuda                JOBS=2         processes (default: one per core, at most 4)
#            SEEDS=1        seeds of the headline tables     SEED_ALL=1     seeds of every table
#            TABLE=ubt.table1, FIGURE=ubt.fig8, CLAIM=ubt.c05   only what that needs
#            FORCE=1        run again although nothing changed
PAPER ?=
PROFILE ?= mini
DEVICE ?= auto
JOBS ?= auto
SEEDS ?= 1
SEED_ALL ?=
TABLE ?=
FIGURE ?=
CLAIM ?=
FORCE ?=
PYTHON ?= python3
RUN ?=

# Everything is called through the environment's own interpreter: a path with spaces does no harm then.
PY := .venv/bin/python
READY := .venv/ready
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: reproduce publish test lint outputs lab site bench readme clean
.DEFAULT_GOAL := reproduce

$(READY): constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else f"error: Python {v.major}.{v.minor} found, 3.11 to 3.13 needed: make PYTHON=python3.12 ...")'
	@echo "creating the environment in .venv (once; a few minutes) ..."
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip setuptools wheel
	@PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --constraint constraints.txt --editable '.[reproduce,cluster,shards,datasets,site,dev]'
	@touch $@

reproduce: $(READY)
	@$(PY) -m mcl_repro run $(PAPER) --profile $(PROFILE) --device $(DEVICE) --jobs $(JOBS) --seeds $(SEEDS) $(if $(SEED_ALL),--seed-all) $(if $(TABLE),--table $(TABLE)) $(if $(FIGURE),--figure $(FIGURE)) $(if $(CLAIM),--claim $(CLAIM)) $(if $(FORCE),--force) $(RUN)

publish: $(READY)
	@$(PY) -m mcl_repro.dev.publishing --profile $(PROFILE) $(RUN)

test: $(READY)
	@$(PY) tests/run_all.py $(if $(FORCE),--force) $(if $(filter cuda,$(DEVICE)),--device cuda)

lint: $(READY)
	@$(PY) tests/run_all.py --lint

outputs: $(READY)
	@$(PY) -m mcl_repro.dev.outputs $(RUN)

lab: $(READY)
	@$(PY) -m jupyterlab --notebook-dir=nbs

site: $(READY)
	@$(PY) -m mcl_repro.dev.site --profile $(PROFILE)

bench: $(READY)
	@$(PY) benchmarks/speed.py

readme: $(READY)
	@$(PY) -m mcl_repro.dev.publishing --front

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .stamps
