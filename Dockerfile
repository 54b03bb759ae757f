# A worker. Build and run it with:
#   docker build -t cachebus-worker .
#   docker run cachebus-worker worker --bus nats://host --backend primary=redis://host
FROM python:3.12.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY cachebus cachebus
RUN python -m venv /opt/cachebus && /opt/cachebus/bin/pip install --no-cache-dir '.[redis,memcached,nats]'

FROM python:3.12.11-slim-bookworm
COPY --from=build /opt/cachebus /opt/cachebus
RUN useradd --system --uid 10001 --no-create-home cachebus
USER 10001
ENV PATH=/opt/cachebus/bin:$PATH PYTHONUNBUFFERED=1
# SIGTERM drains the worker. Docker kills it after 10 s by default: set stop_grace_period above --grace.
STOPSIGNAL SIGTERM
ENTRYPOINT ["cachebus"]
CMD ["worker"]
# The health check reads CACHEBUS_BUS and CACHEBUS_NAMESPACE from the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5s --retries=3 CMD ["cachebus", "ping", "--timeout", "3"]
