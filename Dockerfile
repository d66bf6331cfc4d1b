# docker build -t imrcnn-d2 .
# docker run --rm --gpus all --shm-size 2g imrcnn-d2                    the demo
# docker run --rm -it -v "$PWD/datasets:/home/imrcnn/app/datasets" imrcnn-d2 bash
#
# For a machine without a GPU:
# docker build -t imrcnn-d2:cpu --build-arg BASE_IMAGE=debian:12-slim \
#     --build-arg TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu" .

# The CUDA runtime alone: torch's wheels bring cuDNN, cuBLAS and the rest.
ARG BASE_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${BASE_IMAGE}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home imrcnn
USER imrcnn
WORKDIR /home/imrcnn/app
COPY --chown=imrcnn . .

# As for `make install TORCH=...`; empty is the tested build.
ARG TORCH=""
RUN PIP_NO_CACHE_DIR=1 make install
ENV PATH="/home/imrcnn/app/.venv/bin:${PATH}"
CMD ["make", "demo"]
