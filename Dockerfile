# Three images: light (router, Flower), cpu (worker with llama.cpp), gpu (worker with vLLM).

FROM python:3.12-slim AS light
RUN useradd --create-home shiftworker && install -d -o shiftworker /models
ENV HF_HOME=/models PYTHONUNBUFFERED=1
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY common common
COPY worker worker
RUN pip install --no-cache-dir ".[worker]"
USER shiftworker
ENTRYPOINT ["shiftworker"]

FROM light AS cpu
USER root
# xllamacpp is linked against OpenMP, which the slim image lacks.
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir ".[worker,llamacpp]"
USER shiftworker
CMD ["worker"]

# vLLM's own image brings CUDA and the vLLM that our settings name; it runs as root.
FROM vllm/vllm-openai:v0.33.0 AS gpu
ENV HF_HOME=/models PYTHONUNBUFFERED=1
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY common common
COPY worker worker
RUN uv pip install --system --no-cache ".[worker]"
ENTRYPOINT ["shiftworker"]
CMD ["worker"]
