# Everything here sets itself up: a virtual environment in .venv, nothing outside the folder.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.calotype-setup
# The oldest and the newest client of OpenAI's second major version; the tests drive both.
OPENAI_CLIENTS := 2.0.0 2.54.0

# Every process of a service imports thousands of modules: compiled once, they are read afterwards.
unexport PYTHONDONTWRITEBYTECODE

CYCLONEDX := 7.5.0

# Test files run side by side; many of them wait more than they compute.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test test-fast test-cluster simulation controlplane lint serve bench constraints sbom clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt hatch_build.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet -c constraints.txt uv
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[all,dev]"
	for version in $(OPENAI_CLIENTS); do \
		$(BIN)/python -m uv pip install --quiet --python $(BIN)/python \
			--target .venv/clients/openai-$$version openai==$$version; done
	touch $(STAMP)

demo: setup
	$(BIN)/python -m calotype.serving.commands.demo

# Everything that needs no Kubernetes control plane.
test: lint
	$(PYTEST) -m "not cluster" --cov --cov-report=term

# What answers within two minutes: no service is started, no large model is drawn with.
test-fast: setup
	$(PYTEST) -m "not cluster and not slow"

# The tests that need a Kubernetes control plane; one after the other, for Ray's nodes start in time only
# where they have the processors.
test-cluster: setup controlplane
	$(BIN)/python -m pytest -m cluster

# Builds etcd, the API server and the rest into a cache outside the folder; about 25 minutes once.
controlplane:
	$(PYTHON) tests/controlplane/binaries.py

# What the tests of the simulation leave out: more seeds, and every planted bug looked for from the first.
simulation: setup
	CALOTYPE_SIMULATION_SEEDS=20000 $(BIN)/python -m pytest -s tests/simulation/test_simulation.py
	cd tests && PYTHONPATH=. ../$(BIN)/python -m simulation.run 0:2000 --mutants

lint: setup
	$(BIN)/python -S -c "import collections"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

serve: setup
	$(BIN)/calotype serve

bench: setup
	$(BIN)/python tests/bench/run.py

# Pins every dependency for Python 3.11 and newer; run it to take newer versions. requirements.lock has
# the same versions with the hashes of their files.
COMPILE = $(BIN)/python -m uv pip compile --quiet --universal --python-version 3.11 --all-extras \
	--no-annotate --no-header --no-emit-index-url pyproject.toml
constraints: setup
	$(COMPILE) --upgrade -o constraints.txt
	$(COMPILE) -c constraints.txt --generate-hashes -o requirements.lock

# What the packages consist of, as CycloneDX; the tool runs in an environment of its own.
sbom: setup
	mkdir -p out
	$(BIN)/python -m uv tool run --from cyclonedx-bom==$(CYCLONEDX) cyclonedx-py requirements \
		--pyproject pyproject.toml --output-reproducible requirements.lock -o out/calotype.cdx.json

clean:
	rm -rf .venv .editable out
