"""The deployments in config/: all can be read, and the default one documents every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from config.server_config import ServerConfig
from config.serving_config import LimitsConfig, LoggingConfig, MetricsConfig, ModelConfig, load

FOLDER = Path(__file__).parent.parent / "config"
REQUIRED = {"path", "names", "agent_ports"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_every_deployment_can_be_read(path: Path) -> None:
    config = load(path)
    assert config.model("llama2")
    assert config.model("internlm")


@pytest.mark.parametrize(
    ("section", "record"),
    [
        ("models", ModelConfig),
        ("server", ServerConfig),
        ("limits", LimitsConfig),
        ("logging", LoggingConfig),
        ("metrics", MetricsConfig),
    ],
)
def test_the_default_deployment_shows_every_key_and_its_default(section: str, record: type[msgspec.Struct]) -> None:
    content: Any = yaml.safe_load((FOLDER / "smollm2_cpu.yaml").read_text(encoding="utf-8"))[section]
    shown = content[0] if section == "models" else content
    assert set(shown) == set(record.__struct_fields__)
    defaults = {field.name: field.default for field in msgspec.structs.fields(record) if not field.required}
    for key, default in defaults.items():
        if default is not msgspec.NODEFAULT:
            assert shown[key] == (list(default) if isinstance(default, tuple) else default), key
    assert set(shown) - set(defaults) == (REQUIRED if section == "models" else set())
