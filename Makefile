# One command surface; each target sets up what it needs on a fresh machine with Python 3.11, make, gcc and git.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.synced
BENCH_STAMP := $(VENV)/.synced-bench

# What make bench measures beside steps_to_target, and the last word of its results' folders.
QUESTIONS := step_overhead step_jitter inversion comm_volume memory
HARDWARE ?= cpu

# With cached bytecode a process that imports torch starts in two thirds of the time, and the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-slow check docs gpu bench browser images image-tools

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "uv>=0.9"

$(STAMP): $(BIN)/uv pyproject.toml uv.lock
	$(BIN)/uv sync --frozen --quiet --extra dev
	@touch $@

demo: $(STAMP) ## run the main job: a service, a training job on two workers, its result beside SGD's
	$(BIN)/python deploy/demo.py

serve: $(STAMP) ## keep the service and its dashboard up on http://127.0.0.1:8000
	$(BIN)/ngd serve

# Most tests wait for processes to start: two files at a time keep two cores busy.
test: $(STAMP) browser ## run the tests
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(STAMP) image-tools ## run the tests that take minutes
	$(BIN)/pytest -m slow --timeout 3600

check: $(STAMP) ## lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Material for MkDocs announces its successor on each start; the site is built with what uv.lock pins.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP) ## build the documentation into site/, after the settings' page that it holds
	$(BIN)/python docs/reference/configuration_page.py > docs/configuration.md
	$(BIN)/mkdocs build --strict

gpu: $(STAMP) ## run what needs one GPU, in under ten minutes; says so where there is none
	$(BIN)/python -m benchmarks.gpu_suite

$(BENCH_STAMP): $(STAMP)
	$(BIN)/uv sync --frozen --quiet --extra dev --extra bench
	@touch $@

bench: $(BENCH_STAMP) ## measure on this CPU, for two hours or more; writes benchmarks/results/; needs NGD_DATA_DIR
	: "$${NGD_DATA_DIR:?the folder that holds fashion-mnist/}"
	for question in $(QUESTIONS); do $(BIN)/python -m benchmarks.$$question --hardware $(HARDWARE) || exit; done
	$(BIN)/python -m benchmarks.steps_to_target --data-dir "$$NGD_DATA_DIR" --work .ngd/bench --hardware $(HARDWARE)
	$(BIN)/python -m benchmarks.report

images: ## build the images of the service and of the workers, with docker or buildah; see docker/README.md
	docker/build.sh

# The end-to-end test drives Debian's Chromium; only root may install it, and only where apt is.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { echo "installing chromium for the dashboard test"; apt-get -qq update && apt-get -qq install -y chromium >/dev/null; }; } || \
	  echo "no chromium: the dashboard test will be skipped; to run it: apt-get install chromium"

# A slow test builds the service's image on a Debian that debootstrap makes, with no daemon and no registry.
IMAGE_TOOLS := buildah crun golang-github-containers-common golang-github-containers-image debootstrap shellcheck
image-tools:
	@{ command -v buildah && command -v debootstrap && command -v shellcheck; } >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && { echo "installing buildah, debootstrap and shellcheck for the tests of the images"; \
	  apt-get -qq update && apt-get -qq install -y --no-install-recommends $(IMAGE_TOOLS) >/dev/null; }; } || \
	  echo "no buildah, debootstrap or shellcheck: the tests that need them will be skipped; to run them: apt-get install $(IMAGE_TOOLS)"
