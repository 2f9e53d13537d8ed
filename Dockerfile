# Training with distopt. Two targets, the same but for torch's build:
#
#   docker build --target cuda -t distopt:cuda .
#   docker build --target cpu -t distopt:cpu --build-arg PIP_EXTRA_INDEX_URL=<index of torch's CPU builds> .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/workspace/runs" distopt:cuda
#
# Versions are pinned by launch/constraints.txt; PIP_EXTRA_INDEX_URL is pip's own variable. The folder mounted on /workspace/runs
# has to be writable for user 10001.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm
FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
RUN useradd --create-home --uid 10001 distopt \
    && install -d -o distopt -g distopt /workspace /workspace/runs \
    && python -m venv /opt/venv
WORKDIR /app
COPY launch/constraints.txt launch/constraints.txt

FROM base AS cpu
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir torch==2.13.0+cpu
COPY . .
RUN pip install --no-cache-dir --constraint launch/constraints.txt ".[launch,transformers]"
WORKDIR /workspace
USER 10001
HEALTHCHECK --interval=5m --timeout=60s --start-period=60s CMD ["python", "/app/launch/healthcheck.py", "cpu"]
CMD ["python", "/app/launch/train_hf.py", "--config", "/app/configs/train_hf.yaml"]

FROM base AS cuda
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir torch==2.13.0
COPY . .
RUN pip install --no-cache-dir --constraint launch/constraints.txt ".[launch,transformers]"
WORKDIR /workspace
USER 10001
HEALTHCHECK --interval=5m --timeout=60s --start-period=60s CMD ["python", "/app/launch/healthcheck.py", "cuda"]
CMD ["python", "/app/launch/train_hf.py", "--config", "/app/configs/train_hf.yaml"]
