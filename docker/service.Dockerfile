# The controller: the REST API, the dashboard and the ngd command. No torch, no Ray. Built from the repository's root:
#   docker build -f docker/service.Dockerfile -t ngd-service:0.1.0 .
# docker/README.md: pinning by digest, private package indexes, building without a network.
ARG BASE_IMAGE=docker.io/library/python:3.11.15-slim-bookworm

# A linter does not see the tag in BASE_IMAGE; tests/docker does.
# checkov:skip=CKV_DOCKER_7: the full tag stands in BASE_IMAGE
FROM ${BASE_IMAGE} AS builder
WORKDIR /build
COPY docker/environment.sh docker/build.txt docker/
RUN --mount=type=secret,id=package-index --mount=type=secret,id=ca-certificates \
    docker/environment.sh tools
COPY pyproject.toml uv.lock ./
COPY workers/pyproject.toml workers/
COPY service/pyproject.toml service/
RUN --mount=type=secret,id=package-index --mount=type=secret,id=ca-certificates \
    docker/environment.sh dependencies service-image
COPY README.md LICENSE ./
COPY ngd_dist ngd_dist
COPY workers workers
COPY service service
RUN docker/environment.sh project

FROM ${BASE_IMAGE} AS service
RUN groupadd --gid 10001 ngd \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/ngd --shell /usr/sbin/nologin ngd \
    && install -d -o 10001 -g 10001 -m 0770 /var/lib/ngd /var/lib/ngd/runs \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=builder /opt/ngd /opt/ngd
COPY --from=builder /opt/sbom.cdx.json /usr/share/doc/ngd/sbom.cdx.json
COPY LICENSE /usr/share/doc/ngd/LICENSE
COPY docker/healthcheck.py /usr/local/lib/ngd/healthcheck.py

# The root file system may be read-only: /tmp and /var/lib/ngd are all that is written. HOME is where libraries leave
# caches; what must last is in NGD_HOME. The bytecode is in the image already.
ENV PATH=/opt/ngd/bin:$PATH \
    HOME=/tmp \
    NGD_HOME=/var/lib/ngd \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /var/lib/ngd
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "/usr/local/lib/ngd/healthcheck.py", "service"]
ENTRYPOINT ["ngd"]
CMD ["serve"]

# Last, for they change with each commit and nothing above does.
ARG BASE_IMAGE
ARG VERSION=0.0.0
ARG REVISION=unknown
ARG CREATED=1980-01-01T00:00:00Z
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="ngd-service" \
      org.opencontainers.image.description="Controller and dashboard of ngd-dist: distributed training with SP-NGD" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
