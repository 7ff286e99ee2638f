# One image for every service of docker-compose.yml that is ours: workers, relay, Airflow, Flower, metrics, commands.
#
#   BASE_IMAGE    Python 3.11 to 3.13 with venv and headers, on Debian or Ubuntu
#   TORCH_INDEX   a further package index, for another build of torch; a host without a GPU wants the CPU's, a tenth
#                 of the size: https://download.pytorch.org/whl/cpu
#   PIP_…         where pip finds packages, if not on PyPI
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

# Triton compiles its kernels on the host that runs them: it needs a C compiler.
# The folders that volumes are mounted on are open to all, as volumes inherit that: any user may run this image.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /app /airflow/logs /cache /data /tmp/virnucpro-locks \
    && chmod 1777 /airflow /airflow/logs /cache /data /tmp/virnucpro-locks \
    && python3 -m venv /opt/venv

ARG TORCH_INDEX
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
WORKDIR /app
COPY pyproject.toml constraints.txt ./
# The packages are not there yet: this installs what they need, and a change of theirs does not install it again.
RUN touch README.md \
    && /opt/venv/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} .

COPY virnucpro_core virnucpro_core
COPY workers workers
COPY dags dags
COPY migrations migrations
RUN /opt/venv/bin/python -m compileall -q .

# Whatever user runs it has a name, which Airflow asks for.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=virnucpro \
    AIRFLOW_HOME=/airflow \
    TRITON_CACHE_DIR=/cache/triton \
    MPLCONFIGDIR=/cache/matplotlib
USER 1000:1000
CMD ["virnucpro", "--help"]
