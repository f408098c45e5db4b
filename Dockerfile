# Quartet on a CPU. Its authors have built it, and run all stages in it without a network, on a base of their own
# (Debian 12, Python 3.11, --build-arg PYTHON=3.11); not yet on the base image that it names.
#   docker build -t quartet .
#   mkdir -p runs && docker run --rm -v "$PWD/runs:/work/runs" quartet run
# It runs as user 1000, who must be able to write runs/; with another account, add --user "$(id -u)" -e HOME=/tmp.
# The studio listens on loopback only, so it needs the host's network: docker run --network host … quartet studio
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir -c /tmp/constraints.txt \
        --index-url "$TORCH_INDEX" torch
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt /wheels/*.whl && rm -r /wheels
RUN useradd --uid 1000 --create-home quartet && mkdir /work && chown quartet /work
USER 1000
WORKDIR /work
ENTRYPOINT ["quartet"]
CMD ["run"]
