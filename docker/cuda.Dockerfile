# Quartet with CUDA. Written, never built and never run: torch's wheels bring CUDA's libraries, the host its driver.
#   docker build -t quartet-cuda -f docker/cuda.Dockerfile .
#   mkdir -p runs && docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/work/runs" quartet-cuda run
FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt /wheels/*.whl && rm -r /wheels
RUN useradd --uid 1000 --create-home quartet && mkdir /work && chown quartet /work
USER 1000
WORKDIR /work
ENTRYPOINT ["quartet"]
CMD ["run"]
