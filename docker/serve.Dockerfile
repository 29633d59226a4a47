# Models, downloads and checks of files: torch, diffusers and Ray Serve.
#   docker build -f docker/serve.Dockerfile --build-arg PYTHON_DIGEST=sha256:... -t calotype-serve:0.1.0 .
# With --build-arg COMPILER=g++ it is larger, and models may ask for acceleration.compile.
# The base is pinned by its digest, an argument without a default: who builds decides, and can repeat it.
# CUDA comes with torch's wheels; the nodes bring the driver.
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
    && python -m pip --python /opt/calotype/bin/python install -c constraints.txt ".[serve,cloud]"

FROM python:${PYTHON_TAG}@${PYTHON_DIGEST}
LABEL org.opencontainers.image.title="calotype-serve" \
      org.opencontainers.image.description="Models of calotype on Ray Serve" \
      org.opencontainers.image.licenses="Apache-2.0"
ARG COMPILER=
# KubeRay's probes call wget. Debian keeps only the newest version of a package, so a pinned one would
# soon be gone; the base's digest says which Debian it is.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget ${COMPILER:+"$COMPILER"} \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 calotype \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /bin/bash calotype \
    && install -d -o 10001 -g 10001 /var/lib/calotype
COPY --from=build /opt/calotype /opt/calotype
# The root file system is read-only: what libraries cache lies on the volume or in /tmp.
ENV PATH=/opt/calotype/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/.cache \
    HF_HOME=/var/lib/calotype/cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
EXPOSE 8000 8265 6379
CMD ["calotype", "model-app", "--config", "/etc/calotype/model/model.json", "--port", "8000"]
