# The BIDS app.
#
#   docker build -t cadiff .
#   docker run --rm -u $(id -u) -v /data:/data cadiff /data/bids /data/out participant
#
# With CUDA:      --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
#                 --build-arg TAG=cadiff:cuda -t cadiff:cuda
# Another base:   --build-arg BASE_IMAGE=debian:bookworm-slim   (it needs apt or Python >= 3.11)
# No templates:   --build-arg TEMPLATES=
# One scan:       docker run --entrypoint cadiff-seg ... cadiff /data/sub-01_T1w.nii.gz -o /data/out
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS python
RUN command -v python3 > /dev/null && python3 -c "import ensurepip" 2> /dev/null || ( \
    apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* )

FROM python AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=dask,dicom,validate
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE CHANGELOG.md ./
COPY cadiff_cli cadiff_cli
COPY weights weights
RUN python3 -m venv /opt/cadiff \
 && /opt/cadiff/bin/pip install --no-cache-dir --no-compile --extra-index-url "${TORCH_INDEX}" \
      -c constraints.txt ".[${EXTRAS}]"

# Templates are fetched once, here, where the network allows; without one the image is complete but
# for them: it uses the embedded template, or TEMPLATEFLOW_HOME from outside.
FROM build AS templates
ARG TEMPLATES="MNIColin27 MNI152NLin2009cAsym"
ENV TEMPLATEFLOW_HOME=/opt/templateflow
RUN mkdir -p "${TEMPLATEFLOW_HOME}" \
 && for name in ${TEMPLATES}; do \
      /opt/cadiff/bin/cadiff fetch "${name}" || echo "NOTE: ${name} is not in this image"; \
    done

FROM python
ARG VERSION=0.1.0
ARG TAG=cadiff:latest
ARG REVISION=unknown
LABEL org.opencontainers.image.title="cadiff" \
      org.opencontainers.image.description="Brain structures and volumes from T1w MRI; a BIDS app" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-NC-4.0"
COPY --from=build /opt/cadiff /opt/cadiff
COPY --from=templates /opt/templateflow /opt/templateflow
# Any uid, no home directory and a read-only root filesystem must work: what is written goes to
# /tmp (docker run --read-only --tmpfs /tmp).
ENV PATH=/opt/cadiff/bin:$PATH \
    HOME=/tmp \
    TEMPLATEFLOW_HOME=/opt/templateflow \
    TEMPLATEFLOW_AUTOUPDATE=off \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    CADIFF_DOCKER_TAG=${TAG}
WORKDIR /tmp
USER 1000
ENTRYPOINT ["cadiff", "run"]
CMD ["--help"]
