# A Ray node that trains: head, worker, or a controller that trains by itself. From the repository's root:
#   docker build -f docker/worker.Dockerfile --build-arg VARIANT=cuda -t ngd-worker:0.1.0-cuda .
#   docker build -f docker/worker.Dockerfile --build-arg VARIANT=cpu -t ngd-worker:0.1.0-cpu .
# cuda installs exactly uv.lock, CUDA libraries among it, and trains on CPUs too; cpu is for clusters without GPUs, with
# PyTorch's CPU builds: some GB smaller. docker/README.md says the rest.
ARG BASE_IMAGE=docker.io/library/python:3.11.15-slim-bookworm
ARG VARIANT=cuda

# A linter does not see the tag in BASE_IMAGE; tests/docker does.
# checkov:skip=CKV_DOCKER_7: the full tag stands in BASE_IMAGE
FROM ${BASE_IMAGE} AS builder
ARG VARIANT
ARG CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG CPU_TORCH=
WORKDIR /build
COPY docker/environment.sh docker/build.txt docker/
RUN --mount=type=secret,id=package-index --mount=type=secret,id=ca-certificates \
    docker/environment.sh tools
COPY pyproject.toml uv.lock ./
COPY workers/pyproject.toml workers/
COPY service/pyproject.toml service/
RUN --mount=type=secret,id=package-index --mount=type=secret,id=ca-certificates \
    CPU_TORCH_INDEX="${CPU_TORCH_INDEX}" CPU_TORCH="${CPU_TORCH}" \
    docker/environment.sh "dependencies-${VARIANT}" worker-image
COPY README.md LICENSE ./
COPY ngd_dist ngd_dist
COPY workers workers
COPY service service
RUN docker/environment.sh project

FROM ${BASE_IMAGE} AS worker
ARG VARIANT
# NCCL reaches InfiniBand and RoCE through these at run time, and falls back to TCP without them. No version: Debian keeps
# one per release, and a pinned one would be gone with the next security update; the base image's digest is the pin.
# hadolint ignore=DL3008
RUN if [ "${VARIANT}" = cuda ]; then \
      apt-get update \
      && apt-get install -y --no-install-recommends libibverbs1 ibverbs-providers librdmacm1 \
      && rm -rf /var/lib/apt/lists/*; \
    fi
RUN groupadd --gid 10001 ngd \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/ngd --shell /bin/bash ngd \
    && install -d -o 10001 -g 10001 -m 0770 /var/lib/ngd /var/lib/ngd/runs \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=builder /opt/ngd /opt/ngd
COPY --from=builder /opt/sbom.cdx.json /usr/share/doc/ngd/sbom.cdx.json
COPY LICENSE /usr/share/doc/ngd/LICENSE
COPY docker/healthcheck.py /usr/local/lib/ngd/healthcheck.py

# As in service.Dockerfile; and Ray tells nobody of its use. NVIDIA_VISIBLE_DEVICES is not set: "all" would show each GPU of
# a node to pods that asked for none. `docker run --gpus` and Kubernetes' device plugin set it.
ENV PATH=/opt/ngd/bin:$PATH \
    HOME=/tmp \
    NGD_HOME=/var/lib/ngd \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /var/lib/ngd
USER 10001:10001
# For a Ray node. A controller in this image is asked with "service" instead; see docker/README.md.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=8 \
    CMD ["python3", "/usr/local/lib/ngd/healthcheck.py", "ray"]
# No entry point: KubeRay gives its own command, bash -c "ulimit -n ...; ray start ...".
CMD ["bash"]

ARG BASE_IMAGE
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1980-01-01T00:00:00Z
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="ngd-worker" \
      org.opencontainers.image.description="Ray node of ngd-dist that trains with SP-NGD (${VARIANT})" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      dev.ngd.variant="${VARIANT}"
