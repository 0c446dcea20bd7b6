# docker build -t cadiff . && docker run --rm -u $(id -u) -v $PWD:/data cadiff seg /data/sub-01_T1w.nii.gz -o /data/out
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE CHANGELOG.md ./
COPY cadiff_cli cadiff_cli
COPY weights weights
RUN python -m venv /opt/cadiff \
 && /opt/cadiff/bin/pip install --no-cache-dir -c constraints.txt .

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="cadiff" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/cadiff /opt/cadiff
# Any uid, no home directory and a read-only root filesystem must work: caches go to /tmp.
ENV PATH=/opt/cadiff/bin:$PATH \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
USER 1000
ENTRYPOINT ["cadiff"]
