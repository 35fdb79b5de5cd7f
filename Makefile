# Every target does its own set-up; the second time that takes no time.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready

.PHONY: setup demo check test acceptance bench lint docs

setup: $(READY)

$(READY): pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

demo: $(READY)
	test -d data/digits || $(BIN)/python -m jobs.prepare jobs/configs/digits.toml
	$(BIN)/python -m jobs.search jobs/configs/search.toml

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# For every commit: no Ray, and no test that takes seconds by itself.
check: lint
	$(BIN)/pytest -m "not acceptance and not ray and not slow" --numprocesses 2 --dist loadfile

test: lint docs
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder # the long ones, on Ray, first

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(READY)
	$(BIN)/python -m tests.benchmarks

acceptance: $(READY)
	$(BIN)/pytest -m acceptance
