# make demo   install, then prune, repair and report on the bundled model
# make test   install with the development tools, then run every notebook and every test
# make lab    open the course in JupyterLab
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lab export results clean

demo: $(VENV)/installed
	$(BIN)/ressa repair

test: $(VENV)/developing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lab: $(VENV)/developing
	$(BIN)/jupyter lab --notebook-dir nbs

# what a change to a notebook needs: the library, clean notebooks, the README
export: $(VENV)/developing
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/readme.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: settings.ini setup.py pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/developing: settings.ini setup.py pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist *.egg-info _docs _proc
