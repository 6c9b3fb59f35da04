# make book: everything from a fresh clone to the HTML    make explore: the explorer in a browser
# make test: the whole test suite                         make clean: removes .venv and the built book
PYTHON ?= python3
PROFILE ?= shipped
CONSTRAINTS ?= constraints.txt# `make CONSTRAINTS= book` installs the newest versions instead
BIN = .venv/bin
PIP = $(BIN)/python -m pip
UV = $(BIN)/uv pip install --quiet --python $(BIN)/python --system-certs --compile-bytecode
PINS = $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
PACKAGE = --editable ".[book,cluster,detection,text,test]"

.PHONY: install book explore test clean

install: .venv/installed # with uv, which is faster; with pip where uv fails or pip is set to an index of its own

.venv/installed: pyproject.toml $(CONSTRAINTS)
	@start=$$(date +%s); $(PYTHON) -m venv .venv && \
	if $(PIP) config list | grep -q 'index-url=.*http' || ! { $(PIP) install --quiet $(PINS) uv && $(UV) $(PINS) $(PACKAGE); }; \
	then $(PIP) install --quiet $(PINS) $(PACKAGE); fi && \
	echo "installation: $$(( $$(date +%s) - start )) s" && touch $@

book: install
	@$(BIN)/kdx book --profile $(PROFILE)

explore: install
	JUPYTER_PATH=book/_voila $(BIN)/voila --template kdx notebooks/explorer.ipynb

test: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15

clean: # keeps the data and the trained networks
	rm -rf .venv book/_build book/executed
