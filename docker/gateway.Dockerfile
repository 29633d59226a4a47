# The gateway: the HTTP API, with neither torch nor Ray.
#   docker build -f docker/gateway.Dockerfile --build-arg PYTHON_DIGEST=sha256:... -t calotype-gateway:0.1.0 .
# The base is pinned by its digest, an argument without a default: who builds decides, and can repeat it.
ARG PYTHON_TAG=3.12-slim-trixie
ARG PYTHON_DIGEST

FROM python:${PYTHON_TAG}@${PYTHON_DIGEST} AS build
WORKDIR /src
COPY constraints.txt pyproject.toml hatch_build.py README.md LICENSE ./
COPY serving serving
COPY moderation moderation
COPY operator operator
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/calotype \
    && python -m pip --python /opt/calotype/bin/python install -c constraints.txt ".[cloud]"

FROM python:${PYTHON_TAG}@${PYTHON_DIGEST}
LABEL org.opencontainers.image.title="calotype-gateway" \
      org.opencontainers.image.description="HTTP API of calotype" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 calotype \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin calotype \
    && install -d -o 10001 -g 10001 /var/lib/calotype
COPY --from=build /opt/calotype /opt/calotype
ENV PATH=/opt/calotype/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
USER 10001:10001
EXPOSE 8000
CMD ["calotype", "gateway", "--config", "/etc/calotype/gateway/gateway.json", "--host", "0.0.0.0", "--port", "8000"]
