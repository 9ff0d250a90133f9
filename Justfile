# lint, types and tests: what CI and the pre-commit hooks run
check: lint types test

lint:
    ruff check
    ruff format --check
    lint-imports

types:
    mypy

test *arguments:
    pytest {{ arguments }}

# the site in site/; needs the extra `docs`
docs:
    mkdocs build --strict

# put right what a machine can
format:
    ruff check --fix
    ruff format
