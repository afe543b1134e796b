# A server of one checkpoint, from the package index alone: docker build -t kvlatent-serve .
# docker run --rm -p 8000:8000 -v ./smaller:/model:ro kvlatent-serve
FROM python:3.11-slim

# torch alone and first, so that the constraint holds it; --index-url chooses another index for all of it.
COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir -c /tmp/constraints.txt torch==2.13.0
COPY pyproject.toml README.md LICENSE /tmp/kvlatent/
COPY src /tmp/kvlatent/src
RUN pip install --no-cache-dir -c /tmp/constraints.txt "/tmp/kvlatent[serve]" xllamacpp

# The model is read; exports and compiled kernels go to the cache, which is the user's own.
RUN useradd --create-home server
USER server
ENV HF_HUB_OFFLINE=1
EXPOSE 8000
ENTRYPOINT ["kvlatent", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000"]
