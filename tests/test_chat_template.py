"""A model's chat template in Jinja's sandbox."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from serving_processes import ROOT

from client.deployment import ServedModel
from config.manifest import file_digest, read_manifest, write_manifest
from config.serving_config import ChatTemplateName, ModelConfig, ServingConfig
from server.chat_template import CHAT_TEMPLATES, ChatTemplate
from server.errors import InvalidRequest
from server.metrics import Metrics
from server.request import GenerationParams
from server.token_bytes import TokenizerError

CHATML = (
    "{% for message in messages %}\n"
    "    {% if message.role not in ('system', 'user', 'assistant') %}\n"
    "        {{ raise_exception('unknown role ' + message.role) }}\n"
    "    {% endif %}\n"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def render(source: str, *messages: dict[str, object], add_generation_prompt: bool = True) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    return template.render(messages, add_generation_prompt=add_generation_prompt)


def test_a_conversation() -> None:
    messages = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "<b> & 你好"})
    assert render(CHATML, *messages, add_generation_prompt=False) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n<b> & 你好<|im_end|>\n"
    )
    assert render(CHATML, *messages).endswith("<|im_end|>\n<|im_start|>assistant\n")


TALK: list[dict[str, object]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why?"},
]


def test_templates_of_models_that_bring_none() -> None:
    internlm, llama2 = CHAT_TEMPLATES["internlm"], CHAT_TEMPLATES["llama2"]
    assert render(internlm, TALK[1]) == "<s><|User|>:Hi<eoh>\n<|Bot|>:"
    assert render(internlm, *TALK) == (
        "<s><|System|>:Be kind.\n<|User|>:Hi<eoh>\n<|Bot|>:Hello<eoa>\n<|User|>:Why?<eoh>\n<|Bot|>:"
    )
    assert render(llama2, TALK[1]) == "<s>[INST] Hi [/INST]"
    assert render(llama2, *TALK) == (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Why? [/INST]"
    )


@pytest.mark.parametrize("name", ["internlm", "llama2"])
@pytest.mark.parametrize("places", [[], [0], [1, 2], [2, 3], [1, 3], [0, 0, 1], [1, 0, 3]])
def test_their_roles_take_turns(name: ChatTemplateName, places: list[int]) -> None:
    with pytest.raises(InvalidRequest):
        render(CHAT_TEMPLATES[name], *(TALK[place] for place in places))


def test_the_names_that_templates_know() -> None:
    assert render("{{ bos_token }}{{ eos_token }}{{ strftime_now('%%') }}") == "<s></s>%"
    assert render("{{ messages[0] | tojson }}", {"b": "<é>", "a": 1}) == '{"b": "<é>", "a": 1}'
    assert render("{% for m in messages %}{{ m.c }}{% break %}{% endfor %}", {"c": "1"}, {"c": "2"}) == "1"


def test_what_the_template_refuses_is_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest, match="unknown role robot") as caught:
        render(CHATML, {"role": "robot", "content": ""})
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("{{ messages[0].content + 1 }}", id="type"),
        pytest.param("{{ messages[5].content.x }}", id="undefined"),
        pytest.param("{{ range(10000000) }}", id="range"),
        pytest.param("{{ ''.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}", id="escape"),
        pytest.param("{{ messages.append(1) }}", id="mutation"),
    ],
)
def test_whatever_else_goes_wrong_is_no_crash(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_a_template_that_cannot_be_parsed_names_its_line() -> None:
    with pytest.raises(TokenizerError, match="line 2"):
        ChatTemplate("ok\n{% if %}", {})


@pytest.mark.parametrize("has_token", [True, False])
def test_an_answer_ends_where_the_template_says(tmp_path: Path, has_token: bool) -> None:
    shutil.copytree(ROOT / "config" / "standin", tmp_path, dirs_exist_ok=True)
    if has_token:
        tokenizer = tmp_path / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text("utf-8").replace("<|system|>", "<eoa>"), encoding="utf-8")
        manifest = read_manifest(tmp_path)
        files = {**manifest.files, tokenizer.name: file_digest(tokenizer)}
        write_manifest(tmp_path, msgspec.structs.replace(manifest, files=files))
    names = ("plain", "internlm")
    config = ModelConfig(path=str(tmp_path), names=names, agent_ports=(1,), chat_templates={"internlm": "internlm"})
    model, asked = ServedModel(config, ServingConfig(models=(config,)), Metrics()), GenerationParams(stop=("x",))
    ended = model.with_chat_end("internlm", asked)
    assert (ended.stop, ended.stop_token_ids) == ((("x",), (258,)) if has_token else (("x", "<eoa>"), ()))
    assert model.with_chat_end("plain", asked) == asked
    past_end = GenerationParams(ignore_eos=True)
    assert model.with_chat_end("internlm", past_end) == past_end
