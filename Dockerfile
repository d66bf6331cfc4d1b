# docker build -t imrcnn-d2 .                                          from the package index
# docker build -t imrcnn-d2 --build-context bundle=BUNDLE .            from a folder of `make bundle`
# docker run --rm --gpus all --shm-size 2g -v "$PWD/datasets:/data" -v "$PWD/output:/outputs" \
#     imrcnn-d2 --config-file configs/imrcnn_R_50.yaml --data kvasir_seg      docker/entrypoint.sh has more
#
# For a machine without a GPU:
# docker build -t imrcnn-d2:cpu --build-arg BASE_IMAGE=debian:12-slim \
#     --build-arg TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu" .
#
# pip's settings for a private index: --secret id=pip,src=pip.conf (they stay out of the image).

# Debian or Ubuntu. The CUDA runtime alone: torch's wheels bring cuDNN, cuBLAS and the rest.
ARG BASE_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${BASE_IMAGE} AS base
# A base image that has all of this needs no Debian mirror.
RUN if ! { command -v make tini && python3 -c 'import ensurepip'; } > /dev/null 2>&1; then \
        apt-get update \
        && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
            ca-certificates make python3 python3-venv tini \
        && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb; \
    fi
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /app
# The installation depends on these files only: after other changes these layers are reused.
COPY Makefile constraints.txt pyproject.toml LICENSE ./
COPY packaging/bundle.py packaging/
COPY imrcnn_d2/cli/install_detectron2.py imrcnn_d2/cli/
# The editable installation records the package's path, so the package must exist.
COPY imrcnn_d2/__init__.py imrcnn_d2/
COPY imrcnn_d2/weights/LICENSE.txt imrcnn_d2/weights/
RUN touch README.md imrcnn.py

# Collects the weights and the wheels, with a compiler for packages without a wheel for this platform.
FROM base AS collect
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes \
    --no-install-recommends g++ python3-dev
# As for `make bundle`; an empty TORCH is the tested build.
ARG TORCH=""
ARG WEIGHTS=""
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    make bundle BUNDLE=/bundle TORCH="${TORCH}" WEIGHTS="${WEIGHTS}"

# --build-context bundle=DIR replaces this stage, and the one above is not run.
FROM scratch AS bundle
COPY --from=collect /bundle /

FROM base AS source
COPY . /app
# Whatever the umask of the checkout.
RUN chmod -R a+rX /app

FROM base
# Detectron2's folder of downloaded weights, where it also writes locks.
ENV FVCORE_CACHE=/app/weights
RUN --mount=type=bind,from=bundle,target=/bundle \
    make install OFFLINE=/bundle \
    && mkdir -p "$FVCORE_CACHE" && chmod -R a+rwX "$FVCORE_CACHE"

ARG UID=1000
ARG GID=1000
# Some base images have a user of that number already. With --user any other can use the image.
RUN groupadd --non-unique --gid "${GID}" imrcnn \
    && useradd --non-unique --uid "${UID}" --gid "${GID}" --create-home imrcnn \
    && chmod 1777 /home/imrcnn \
    && install -d -o imrcnn -g imrcnn -m 1777 /data /outputs \
    && ln -s /outputs output
COPY --from=source /app /app

ENV PATH="/app/.venv/bin:${PATH}" \
    HOME=/home/imrcnn \
    USER=imrcnn \
    IMRCNN_DATASETS=/data \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OMP_WAIT_POLICY=PASSIVE \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG VERSION=0.3.0
ARG REVISION=""
ARG CREATED=""
LABEL org.opencontainers.image.title="IMR-CNN on Detectron2" \
      org.opencontainers.image.description="Trains and evaluates IMR-CNN on endoscopic images; research software, not a medical device" \
      org.opencontainers.image.licenses="Apache-2.0 AND LicenseRef-Kvasir-SEG-and-PolypGen-research-and-education" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
USER imrcnn
VOLUME ["/data", "/outputs"]
# tini passes the signal of `docker stop` to the training, which saves and exits with 75.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/bin/tini", "-s", "--", "/app/docker/entrypoint.sh"]
CMD ["--help"]
