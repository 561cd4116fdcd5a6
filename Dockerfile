# tune_cifar in a container. Two targets:
#
#   docker build --target cpu -t tune_cifar:cpu .
#   docker build --target cuda -t tune_cifar:cuda .
#
# Data and runs are kept in volumes:
#
#   docker run --rm --init --shm-size 2g -v tune_data:/data -v tune_runs:/runs \
#     tune_cifar:cpu search --space smoke --data shapes
#
# - `data fetch` instead of `search ...` brings CIFAR-10 into /data. With the cuda target add
#   `--gpus all`; the host needs NVIDIA's driver and container toolkit.
# - Both targets install the versions in constraints.txt. torch's usual wheels bring their own CUDA
#   libraries (the environment is about 6.5 GB) and run on a CPU, too. For a smaller cpu image name
#   an index of CPU-only wheels: --build-arg TORCH_INDEX=ADDRESS.
# - The program runs as user 1000 (--build-arg UID=NUMBER for another). A folder of the host in
#   place of a volume must be writable for this user.
# - `docker stop --time 60` leaves running trials the time to write a checkpoint.
# - `ui` listens on the container's loopback address: it needs --network host.
#
# Not run: no image was built and none was started, for want of a Docker engine. What was run are
# the `uv` commands, outside of a container, with Python 3.12 and without TORCH_INDEX.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS tools
ARG UV=0.13.9
RUN python -m pip install --no-cache-dir "uv==${UV}"
ENV UV_CACHE_DIR=/cache \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never \
    VIRTUAL_ENV=/opt/venv
RUN uv venv "$VIRTUAL_ENV"
WORKDIR /src

FROM tools AS wheel
COPY . .
RUN uv build --wheel --build-constraints constraints.txt --out-dir /dist

# The dependencies come before the package: a change of the code alone installs none of them again.
# With a second index the newest version of both is taken; torch's CPU-only wheels count as newer.
FROM tools AS environment-cpu
ARG TORCH_INDEX=
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/cache \
    uv pip install --compile-bytecode -c constraints.txt \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX" --index-strategy unsafe-best-match} \
    -r pyproject.toml --extra onnx --extra dashboard --extra cluster --extra s3 --extra postgres
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    uv pip install --compile-bytecode --no-deps /dist/*.whl

FROM tools AS environment-cuda
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/cache \
    uv pip install --compile-bytecode -c constraints.txt \
    -r pyproject.toml --extra onnx --extra dashboard --extra cluster --extra s3 --extra postgres
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    uv pip install --compile-bytecode --no-deps /dist/*.whl

FROM python:${PYTHON}-slim AS runtime
ARG UID=1000
RUN useradd --create-home --uid "$UID" tune && install --directory --owner tune /data /runs
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TUNE_CIFAR_DATA=/data \
    TUNE_CIFAR_RUNS=/runs
VOLUME ["/data", "/runs"]
WORKDIR /home/tune
USER tune
ENTRYPOINT ["python", "-m", "tune_cifar"]
CMD ["--help"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=environment-cuda /opt/venv /opt/venv

FROM runtime AS cpu
COPY --from=environment-cpu /opt/venv /opt/venv
