#!/usr/bin/env bash
# Makes /opt/ngd, the Python environment of an image, inside its builder stage. Each command is one layer:
#   environment.sh tools                     uv, hatchling and cyclonedx-py in /opt/tools, pinned by build.txt
#   environment.sh dependencies GROUP        what uv.lock pins for this dependency group, each file checked by its hash
#   environment.sh dependencies-cuda ...     the same: PyPI's torch brings the CUDA libraries, and runs on CPUs too
#   environment.sh dependencies-cpu ...      with PyTorch's CPU build in place of torch and the CUDA libraries
#   environment.sh project                   this project's own wheels, bytecode for everything, and the bill of materials
# Settings of the package index come from the secret "package-index" (lines NAME=value: UV_DEFAULT_INDEX, UV_INDEX,
# PIP_INDEX_URL ...) and from "ca-certificates" (a PEM file); neither is kept in a layer.
set -euo pipefail

TOOLS=/opt/tools TARGET=/opt/ngd MATERIALS=/opt/sbom.cdx.json
SETTINGS=/run/secrets/package-index CERTIFICATES=/run/secrets/ca-certificates

export UV_NO_CACHE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1
export DS_BUILD_OPS=0 # DeepSpeed is built without its CUDA kernels
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export SOURCE_DATE_EPOCH=315532800 # 1980-01-01, the first date that a zip file, so a wheel, can hold

if [[ -s $SETTINGS ]]; then
  set -a
  # shellcheck source=/dev/null
  . "$SETTINGS"
  set +a
fi
# One index for both: pip installs the tools, uv everything else.
index=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-}}
if [[ -n $index ]]; then
  export UV_DEFAULT_INDEX=$index PIP_INDEX_URL=${PIP_INDEX_URL:-$index}
fi
if [[ -s $CERTIFICATES ]]; then
  export SSL_CERT_FILE=$CERTIFICATES PIP_CERT=$CERTIFICATES
fi

tools() {
  python3 -m venv "$TOOLS"
  "$TOOLS/bin/pip" install --quiet --require-hashes --no-deps --requirement docker/build.txt
}

# lock --only-group GROUP OPTION...: writes what uv.lock pins as requirements with hashes, our own packages left out.
lock() {
  "$TOOLS/bin/uv" export --quiet --frozen --no-emit-workspace --no-header --no-annotate "$@"
}

install() {
  "$TOOLS/bin/uv" pip install --quiet --python "$TARGET/bin/python" "$@"
}

dependencies() {
  python3 -m venv --without-pip "$TARGET"
  lock --only-group "$1" >/tmp/locked.txt
  install --require-hashes --no-deps --requirement /tmp/locked.txt
}

# The index of CPU builds has other files under the same versions, so uv.lock knows no hash of them: these two packages
# alone are pinned by version. CPU_TORCH names others, where a mirror has no such version.
dependencies_cpu() {
  python3 -m venv --without-pip "$TARGET"
  lock --only-group "$1" --prune torch --prune torchvision >/tmp/locked.txt
  lock --only-group "$1" --no-hashes >/tmp/all.txt
  local wanted
  read -r -a wanted <<<"${CPU_TORCH:-$(sed -n -E 's/^(torch|torchvision)==([^ ;]+).*/\1==\2/p' /tmp/all.txt | xargs)}"
  grep -vE '^(torch|torchvision)==' /tmp/all.txt >/tmp/constraints.txt
  install --require-hashes --no-deps --requirement /tmp/locked.txt
  install --constraint /tmp/constraints.txt --index "$CPU_TORCH_INDEX" "${wanted[@]}"
}

project() {
  "$TOOLS/bin/uv" build --quiet --all-packages --wheel --no-build-isolation --python "$TOOLS/bin/python" --out-dir /tmp/wheel
  # By pip: uv would note the wheel's time of making beside it.
  "$TOOLS/bin/pip" --python "$TARGET/bin/python" install --quiet --no-index --no-deps --no-compile /tmp/wheel/*.whl
  rm -f "$TARGET/.lock" # of uv, and writable for all
  bytecode
  materials
}

# The file system is read-only where the image runs. unchecked-hash: neither the files' times, which differ from build to
# build, nor the sources are looked at on import. -f: what was imported so far has left bytecode of the other kind. In one
# process: what else a process has compiled shows in its bytecode.
# Templates inside of packages need not be valid Python: hence || true.
bytecode() {
  PYTHONHASHSEED=0 "$TARGET/bin/python" -m compileall -q -f -j 1 --invalidation-mode unchecked-hash "$TARGET/lib" >/dev/null || true
  [[ -n $(find "$TARGET/lib" -path '*ngd_service/__pycache__/app.*.pyc' -print -quit) ]]
}

materials() {
  "$TOOLS/bin/cyclonedx-py" environment "$TARGET/bin/python" --pyproject service/pyproject.toml --mc-type application \
    --output-reproducible --spec-version 1.6 --output-format JSON --output-file "$MATERIALS"
}

case "${1:-}" in
  tools | project) "$1" ;;
  dependencies | dependencies-cuda) shift && dependencies "$@" ;;
  dependencies-cpu) shift && dependencies_cpu "$@" ;;
  *)
    echo "environment.sh: no command '${1:-}'; one of tools, dependencies, dependencies-cuda, dependencies-cpu, project" >&2
    exit 2
    ;;
esac
