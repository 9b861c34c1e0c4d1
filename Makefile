.PHONY: check test test-all docs choices

check:  # style, types, import contracts
	ruff format --check . && ruff check . && pyrefly check && lint-imports --no-cache --no-logo

test:  # the fast tests
	pytest -m "not slow and not gpu"

test-all:  # every test that this machine can run
	pytest

docs:  # the site, into site/; a broken link or reference is an error
	mkdocs build --strict --quiet

choices:  # where the paper says nothing, or we do otherwise: what "faithful" means here
	@python docs/hooks.py
