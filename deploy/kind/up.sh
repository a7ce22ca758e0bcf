#!/usr/bin/env bash
# From nothing to a finished job on a kind cluster: deploy/kind/up.sh [recipe.yaml]; it may run again at any point.
# Needs docker, kind, kubectl and helm, and images of docker/build.sh. Environment:
#   MODE       kuberay: a Ray cluster for each attempt; ray_jobs: one for all jobs [kuberay]
#   VERSION    tag of the images [the project's version]
#   KUBERAY    version of KubeRay's operator, 1.6.0 or newer [1.7.0]
set -euo pipefail
cd "$(dirname "$0")/../.."

CLUSTER=ngd NAMESPACE=ngd
MODE=${MODE:-kuberay}
KUBERAY=${KUBERAY:-1.7.0}
VERSION=${VERSION:-$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' ngd_dist/__init__.py)}
RECIPE=${1:-workers/ngd_workers/recipes/digits.yaml}
IMAGES=("ngd-service:$VERSION" "ngd-worker:$VERSION-cpu")

case $MODE in
  kuberay) mode=(--set dispatcher.mode=kuberay) ;;
  ray_jobs) mode=(--set dispatcher.mode=ray_jobs --set rayCluster.enabled=true --set rayCluster.workerGroups[0].replicas=2) ;;
  *) echo "up.sh: MODE must be kuberay or ray_jobs, got '$MODE'" >&2 && exit 2 ;;
esac
for tool in docker kind kubectl helm; do
  command -v "$tool" >/dev/null || { echo "up.sh: no $tool; install it first" >&2 && exit 1; }
done
[[ -r $RECIPE ]] || { echo "up.sh: can't read the recipe $RECIPE" >&2 && exit 1; }
for image in "${IMAGES[@]}"; do
  docker image inspect "$image" >/dev/null 2>&1 ||
    { echo "up.sh: no image $image; build it with: docker/build.sh service worker-cpu" >&2 && exit 1; }
done

kube() { kubectl --context "kind-$CLUSTER" --namespace "$NAMESPACE" "$@"; }
charts() { helm --kube-context "kind-$CLUSTER" "$@"; }

kind get clusters 2>/dev/null | grep -qx "$CLUSTER" || kind create cluster --config deploy/kind/cluster.yaml --wait 120s
kind load docker-image --name "$CLUSTER" "${IMAGES[@]}"
docker exec "$CLUSTER-control-plane" install -d -o 10001 -g 10001 -m 0770 /var/local/ngd/runs

charts upgrade --install kuberay-operator kuberay-operator --version "$KUBERAY" \
  --repo https://ray-project.github.io/kuberay-helm/ --namespace kuberay-system --create-namespace --wait

# Pod Security "restricted": the chart's pods all pass it.
kubectl --context "kind-$CLUSTER" create namespace "$NAMESPACE" --dry-run=client -o yaml |
  kubectl --context "kind-$CLUSTER" apply -f -
kubectl --context "kind-$CLUSTER" label namespace "$NAMESPACE" pod-security.kubernetes.io/enforce=restricted --overwrite
kube apply -f deploy/kind/runs.yaml
if ! kube get secret ngd-people >/dev/null 2>&1; then
  key=$(mktemp)
  trap 'rm -f "$key"' EXIT
  head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$key"
  kube create secret generic ngd-people --from-file=admin="$key"
fi

charts upgrade --install ngd helm/ngd --namespace "$NAMESPACE" --values deploy/kind/values.yaml "${mode[@]}" --wait --timeout 5m
charts test ngd --namespace "$NAMESPACE" --logs

# The job is posted and followed inside the controller's pod, where the service is at hand and the key is mounted.
kube exec -i deployment/ngd-controller -- sh -c 'cat >/tmp/job.yaml' <"$RECIPE"
kube exec deployment/ngd-controller -- \
  ngd submit --url http://127.0.0.1:8000 --key-file /etc/ngd/api-keys/admin --follow /tmp/job.yaml

cat <<END
done. The dashboard: kubectl --context kind-$CLUSTER -n $NAMESPACE port-forward service/ngd-controller 8000:8000
its key:             kubectl --context kind-$CLUSTER -n $NAMESPACE get secret ngd-people -o jsonpath='{.data.admin}' | base64 -d
the end of it:       kind delete cluster --name $CLUSTER
END
