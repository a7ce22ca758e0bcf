#!/usr/bin/env bash
# Builds the images from the repository's root: docker/build.sh [service] [worker-cpu] [worker-cuda]; none named: all three.
# Environment:
#   BUILDER      docker or buildah, options included [docker if its daemon answers, else buildah]
#   REGISTRY     what stands before the images' names, such as registry.example.com/ml [nothing]
#   VERSION      the images' tag [the project's version]
#   BASE_IMAGE   base of every stage, by tag or by digest [what the Dockerfiles say]
#   SOURCE       address of the sources, for the label [unknown]
#   OPTIONS      more words for each build, such as --secret id=package-index,src=index.env
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z ${BUILDER:-} ]]; then
  if docker info >/dev/null 2>&1; then
    BUILDER=docker
  elif command -v buildah >/dev/null; then
    BUILDER=buildah
  else
    echo "no image builder: neither does a docker daemon answer, nor is there buildah; see: make image-tools" >&2
    exit 1
  fi
fi
# HEALTHCHECK is part of Docker's image format alone; buildah's own default would drop it.
read -r -a build <<<"$BUILDER build"
[[ $BUILDER != *buildah* ]] || build+=(--format docker)

version=${VERSION:-$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' ngd_dist/__init__.py)}
arguments=(--build-arg "VERSION=$version" --build-arg "SOURCE=${SOURCE:-unknown}")
if git rev-parse --quiet --verify HEAD >/dev/null 2>&1; then
  revision=$(git rev-parse HEAD)
  git diff --quiet HEAD -- . || revision+=-modified
  arguments+=(--build-arg "REVISION=$revision" --build-arg "CREATED=$(git log -1 --format=%cI)")
fi
[[ -z ${BASE_IMAGE:-} ]] || arguments+=(--build-arg "BASE_IMAGE=$BASE_IMAGE")
read -r -a options <<<"${OPTIONS:-}"

[[ $# -gt 0 ]] || set -- service worker-cpu worker-cuda
for name in "$@"; do
  case $name in
    service) file=service tag=ngd-service:$version more=() ;;
    worker-cpu | worker-cuda)
      variant=${name#worker-}
      file=worker tag=ngd-worker:$version-$variant more=(--build-arg "VARIANT=$variant")
      ;;
    *)
      echo "build.sh: no image '$name'; one of service, worker-cpu, worker-cuda" >&2
      exit 2
      ;;
  esac
  tag=${REGISTRY:+${REGISTRY%/}/}$tag
  echo "building $tag" >&2
  "${build[@]}" "${arguments[@]}" "${more[@]}" "${options[@]}" --file "docker/$file.Dockerfile" --tag "$tag" .
done
