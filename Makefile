.PHONY: check test test-all test-lowest docs choices
LOWEST := $(CURDIR)/.venv-lowest

check:  # style, types, import contracts
	ruff format --check . && ruff check . && pyrefly check && lint-imports --no-cache --no-logo

test:  # the fast tests; plain `pytest` runs one slow test of each kind besides
	pytest -m "not slow and not gpu"

test-all:  # every test that this machine can run
	pytest -m ""

# in a virtual environment of its own; without the check of shapes, which torch.compile before torch 2.14 cannot trace
test-lowest:  # the fast tests with the lowest versions that setup.cfg allows
	python3 -m venv --clear $(LOWEST) && $(LOWEST)/bin/pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[dev]'
	LIDIT_UNCHECKED=1 PATH="$(LOWEST)/bin:$$PATH" $(LOWEST)/bin/python -m pytest -m "not slow and not gpu"

docs:  # the site, into site/; a broken link or reference is an error
	mkdocs build --strict --quiet

choices:  # where the paper says nothing, or we do otherwise: what "faithful" means here
	@python docs/hooks.py
