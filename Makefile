# make book: everything from a fresh clone to the HTML    make explore: the explorer in a browser
# make test: the whole test suite                         make clean: removes .venv and the built book
PYTHON ?= python3
PROFILE ?= shipped
CONSTRAINTS ?= constraints.txt# `make CONSTRAINTS= book` installs the newest versions instead
BIN = .venv/bin
PINS = $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
PACKAGE = --editable ".[book,cluster,detection,text,test]"

.PHONY: install book explore test clean

install: .venv/installed # with uv, which is faster than pip; with pip where uv does not reach the index

.venv/installed: pyproject.toml $(CONSTRAINTS)
	@start=$$(date +%s); $(PYTHON) -m venv .venv && \
	$(BIN)/python -m pip install --quiet $(PINS) uv && \
	{ $(BIN)/uv pip install --quiet --python $(BIN)/python --system-certs --compile-bytecode $(PINS) $(PACKAGE) || \
	$(BIN)/python -m pip install --quiet $(PINS) $(PACKAGE); } && \
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
