# make demo   install, then prune, repair and report on the bundled model
# make test   install with the development tools, then run every notebook and every test
# make site   the documentation, to be read without a network: _docs/index.html
# make lab    open the course in JupyterLab
# make student   write the lessons without solutions into student/, with a wheel to install
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test site lab student export results clean

demo: $(VENV)/installed
	$(BIN)/ressa repair

test: $(VENV)/developing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

site: $(VENV)/developing
	$(BIN)/python nbs/site/make.py

lab: $(VENV)/developing
	$(BIN)/jupyter lab --notebook-dir nbs

student: $(VENV)/developing
	$(BIN)/python nbs/student.py

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
