# `make` alone tells what there is. Nothing but Python and make has to be there before: what is needed is
# installed into .venv, again only when setup.cfg or pyproject.toml changed. Works with GNU make 3.81 and later.

# The Python to make .venv with, instead of the first fitting one.
PYTHON ?=
# More for the program that is run: make test ARGS='-x -k lease'
ARGS ?=
# The PostgreSQL that test-postgresql, test-faults and soak use.
PG_BIN ?= /usr/lib/postgresql/15/bin
# Tests that are not about what a database does, and those of processes that are killed, of which test-faults has its
# own; test-postgresql leaves them out.
NOT_ABOUT_SQL = $(patsubst %,tests/test_%.py,addresses benchmarks cli client client_docs client_retries completion \
	connections consumer daily_commands docs endpoints examples packaging places processes readme receivers rpc schema signatures sync_client slow_clients \
	tracing transport website)

# One process more than there are cores, because a third of the time is waiting, and at most four share the tests,
# each with a PostgreSQL of its own: make test ARGS='-n 0' uses one.
SHARED = -n $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --maxprocesses 4 --dist worksteal

VENV = .venv
PY = $(VENV)/bin/python

# Its name says where and from what was installed; it is written last, so a half-done install leaves none. It does
# not count where the Python went away that .venv was made with.
INSTALLED := $(VENV)/.installed-$(shell (pwd; cat setup.cfg pyproject.toml) | cksum | tr ' ' -)
INSTALLED_RELEASE = $(INSTALLED:$(VENV)/.installed-%=$(VENV)/.installed-release-%)
INSTALLED_DOCS = $(INSTALLED:$(VENV)/.installed-%=$(VENV)/.installed-docs-%)
INSTALLED_E2E = $(INSTALLED:$(VENV)/.installed-%=$(VENV)/.installed-e2e-%)
INSTALLED_BENCH = $(INSTALLED:$(VENV)/.installed-%=$(VENV)/.installed-bench-%)
$(shell [ -x $(PY) ] || rm -f $(VENV)/.installed-*)

# PostgreSQL's wheel decides which Python is too new; one that is named need not care.
FIND_PYTHON = for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	"$$python" -c "import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, $(if $(PYTHON),99,15)))" \
		>/dev/null 2>&1 && echo "$$python" && exit; done; \
	echo "$(if $(PYTHON),$(PYTHON) is no Python 3.11 or newer,Python 3.11 to 3.14 was not found), or lacks ensurepip." \
		"Install one (on Debian and Ubuntu python3-venv as well) or name one: make PYTHON=/path/to/python3" >&2; exit 1

.PHONY: help
help: ## Show this
	@echo "make TARGET, where TARGET is"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(INSTALLED) ## Do real work: hash every file below DEMO_DIR (default: Python's library)
	@$(PY) -m examples.demo $(ARGS)

.PHONY: demo-pubsub
demo-pubsub: $(INSTALLED) ## Publish every module of DEMO_DIR to two subscribers, of which one is killed and comes back
	@$(PY) -m examples.pubsub $(ARGS)

.PHONY: serve
serve: $(INSTALLED) ## Run a broker on http://127.0.0.1:8080, with a PostgreSQL of its own
	@$(PY) -m broker serve $(ARGS)

.PHONY: test
test: $(INSTALLED) ## Run the tests
	@$(PY) -m pytest $(SHARED) $(ARGS)

.PHONY: test-postgresql
test-postgresql: $(INSTALLED) ## Run those with SQL on another PostgreSQL (PG_BIN, default Debian's 15)
	@$(PG_BIN)/postgres --version
	@BROKER_PG_BIN=$(PG_BIN) $(PY) -m pytest $(SHARED) $(NOT_ABOUT_SQL:%=--ignore=%) $(ARGS)

.PHONY: test-faults
test-faults: $(INSTALLED) ## Run the tests that kill, hang and cut off brokers, clients and PostgreSQL (PG_BIN), in five minutes
	@PG_BIN=$(PG_BIN) $(PY) -m pytest $(SHARED) tests/faults $(ARGS)

.PHONY: soak
soak: $(INSTALLED) ## Let random faults happen for as long as asked: make soak ARGS='--seed 7 --faults 50'
	@PG_BIN=$(PG_BIN) $(PY) tests/faults/soak.py $(ARGS)

.PHONY: test-nightly
test-nightly: $(INSTALLED) ## Run what takes hours or root: seeded bugs, power cuts, full disks, Patroni, long soak (ARGS='PART ... --quick')
	@PG_BIN=$(PG_BIN) PYTHONPATH=tests/faults $(PY) tests/nightly/nightly.py $(ARGS)

.PHONY: e2e
e2e: $(INSTALLED_E2E) ## Look at the dashboard in a real browser: Debian's chromium, or the one that CHROMIUM names
	@$(PY) -m pytest $(SHARED) tests/e2e $(ARGS)

.PHONY: screenshots
screenshots: $(INSTALLED_E2E) ## Write the pictures of docs/images anew
	@SCREENSHOTS=docs/images $(PY) -m pytest -n 0 tests/e2e/test_pictures.py $(ARGS)

.PHONY: bench
bench: $(INSTALLED_BENCH) ## Measure beside the peers that are installed, in under ten minutes; needs wrk
	@$(PY) -m benchmarks --out benchmarks/results/bench.json $(ARGS)

.PHONY: bench-flat
bench-flat: $(INSTALLED_BENCH) ## Measure with millions of messages, in under 45 minutes
	@$(PY) -m benchmarks --flat --out benchmarks/results/flat.json $(ARGS)

.PHONY: bench-profile
bench-profile: $(INSTALLED_BENCH) ## Find out where the CPU time of one enqueue goes, in a minute; needs wrk
	@$(PY) -m benchmarks.profile --out benchmarks/results/profile.json --flame docs/profile-enqueue.svg $(ARGS)

.PHONY: bench-smoke
bench-smoke: $(INSTALLED_BENCH) ## Run every benchmark for a second, so that none rots
	@$(PY) -m benchmarks --smoke $(ARGS)
	@$(PY) -m benchmarks.profile --seconds 1 --out /dev/null --flame /dev/null

.PHONY: bench-report
bench-report: $(INSTALLED_BENCH) ## Write docs/performance.md from what was measured
	@$(PY) -m benchmarks.report $(ARGS)

.PHONY: check
check: lint test ## Do what CI does: style, types, layers, generated docs, tests

.PHONY: lint
lint: $(INSTALLED) ## The part of `check` before the tests
	$(PY) -m ruff check --quiet .
	$(PY) -m ruff format --quiet --check .
	$(PY) -m mypy --no-error-summary
	$(VENV)/bin/lint-imports --no-cache
	$(PY) docs/generate.py --check

.PHONY: format
format: $(INSTALLED) ## Format the code and repair what can be repaired
	@$(PY) -m ruff check --quiet --fix . ; $(PY) -m ruff format .

.PHONY: docs
docs: $(INSTALLED) ## Write the generated pages of docs/ anew
	@$(PY) docs/generate.py

.PHONY: site
site: $(INSTALLED_DOCS) ## Build the documentation as a site, build/site/index.html, and look for dead links
	@$(PY) docs/website.py

.PHONY: wheel
wheel: $(INSTALLED) ## Build the sdist, and from it the wheel, into dist/
	@$(PY) -m build --no-isolation --outdir dist

.PHONY: first-minute
first-minute: wheel ## Do what a new user does, from `pip install` of the wheel on, in an empty folder
	@timeout 600 sh tests/first_minute.sh "$$(ls -t dist/wonderq-*.whl | head -1)"

.PHONY: lock
lock: $(INSTALLED_RELEASE) ## Write docker/requirements.txt: every dependency of the image, by version and hash
	@$(VENV)/bin/pip-compile --quiet --upgrade --generate-hashes --strip-extras --allow-unsafe --no-header \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file docker/requirements.txt setup.cfg

.PHONY: audit
audit: $(INSTALLED_RELEASE) ## Ask whether a weakness is known of anything that the image has
	@$(VENV)/bin/pip-audit --strict --require-hashes --disable-pip --requirement docker/requirements.txt

.PHONY: sbom
sbom: $(INSTALLED_RELEASE) ## Write dist/wonderq.cdx.json, a list of what the image has (CycloneDX)
	@mkdir -p dist
	@$(VENV)/bin/cyclonedx-py requirements docker/requirements.txt --output-file dist/wonderq.cdx.json

.PHONY: clean
clean: ## Remove what was installed, built or left by tests and demos
	@rm -rf $(VENV) .cache .demo build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED):
	@rm -f $(VENV)/.installed-*
	@$(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		python=$$($(FIND_PYTHON)) && echo "Making $(VENV) with $$("$$python" --version)" && \
		"$$python" -m venv --clear $(VENV); }
	@echo "Installing into $(VENV), which may take a minute"
	@$(PY) -m pip install -qq --disable-pip-version-check -e '.[embedded,dev]'
	@touch $@

$(INSTALLED_RELEASE): $(INSTALLED)
	@echo "Installing what locks and audits"
	@$(PY) -m pip install -qq --disable-pip-version-check -e '.[embedded,dev,release]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@echo "Installing what builds the site"
	@$(PY) -m pip install -qq --disable-pip-version-check -e '.[embedded,dev,docs]'
	@touch $@

$(INSTALLED_E2E): $(INSTALLED)
	@echo "Installing what drives a browser"
	@$(PY) -m pip install -qq --disable-pip-version-check -e '.[embedded,dev,e2e]'
	@touch $@

$(INSTALLED_BENCH): $(INSTALLED)
	@echo "Installing what is measured beside"
	@$(PY) -m pip install -qq --disable-pip-version-check -e '.[embedded,dev,bench]'
	@touch $@
