# Commands of a working day. `just` lists them. They use the active environment
# (`pip install -e '.[dev]'`).

_list:
    @just --list

# Tests of a path, or all that need no serving engine.
test *paths:
    pytest {{paths}}

# Style, format, types.
lint:
    ruff check .
    ruff format --check .
    mypy

# Rewrite what the linters can.
format:
    ruff check --fix .
    ruff format .

# Result tables of README and docs/, from benchmarks/results.
tables:
    python tools/make_tables.py

# The documentation site, in site/.
docs:
    python tools/make_tables.py --check
    mkdocs build --strict

# Install a serving engine on a CPU and test on it: `just engine vllm`, `just engine sglang 0.5.20 0.5.23`.
engine name *versions:
    tests/on_{{name}}/install.sh .venv-{{name}} {{versions}}
    tests/on_{{name}}/run.sh .venv-{{name}}

# Check the engine symbols that the adapters touch against each supported version's wheel.
contracts wheels="wheels":
    tests/contracts/download.sh pip {{wheels}}
    ENGINE_WHEELS={{wheels}} pytest tests/contracts

# Build wheel and sdist, install them into a bare environment, and try them.
wheel:
    tests/try_wheel.sh

# All that CI runs.
ci:
    .ci/run
