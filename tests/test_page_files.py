"""``GET /ui`` and its files: headers, revalidation, and a table that no path leads out of."""

from __future__ import annotations

import ast
import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from client.schemas.openai_chat import ChatRequest
from client.schemas.request_body import MAX_SEED

ROOT = Path(__file__).parent.parent
WEB = ROOT / "client" / "web"
FILES = sorted(path.name for path in WEB.iterdir())
SCRIPTS = [name for name in FILES if name.endswith(".js")]
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
}


def url(name: str) -> str:
    return "/ui" if name == "index.html" else f"/ui/{name}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_served_as_it_is_with_its_type_and_a_strict_policy(client: httpx.Client, name: str) -> None:
    response = client.get(url(name))
    assert response.status_code == 200
    assert response.content == (WEB / name).read_bytes()
    assert response.headers["content-type"] == TYPES[Path(name).suffix]
    assert set(response.headers["content-security-policy"].split("; ")) == POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}'])
def test_a_browser_that_has_a_file_is_not_sent_it_again(client: httpx.Client, name: str, form: str) -> None:
    tag = client.get(url(name)).headers["etag"]
    known = client.get(url(name), headers={"if-none-match": form.format(tag)})
    assert (known.status_code, known.content) == (304, b"")
    assert known.headers["etag"] == tag
    assert "content-security-policy" in known.headers
    assert client.get(url(name), headers={"if-none-match": tag[:-2] + '"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/ui/none.js",
        "/ui/../ui/none.js",
        "/ui/..%2f..%2fserver_app_post.py",
        "/ui/%2e%2e/server_app_post.py",
        "/ui/....//server_app_post.py",
        "/ui/%2fetc%2fpasswd",
        "/ui/..\\..\\server_app_post.py",
        "/ui/app.js%00",
        "/ui/app.js/",
        "/ui/APP.JS",
    ],
)
def test_no_path_leads_elsewhere(client: httpx.Client, path: str) -> None:
    response = client.send(httpx.Request("GET", httpx.URL(client.base_url).copy_with(raw_path=path.encode())))
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/json"


def test_a_slash_too_many_leads_to_the_page_whatever_host_was_asked(client: httpx.Client) -> None:
    response = client.get("/ui/", headers={"host": "elsewhere"})
    assert (response.status_code, response.headers["location"]) == (308, "../ui")


def test_the_page_takes_no_other_method(client: httpx.Client) -> None:
    assert client.post("/ui", json={}).status_code == 405


def test_everything_that_the_page_names_is_there() -> None:
    named = set(re.findall(r'(?:href|src)="(ui/[^"]+)"', (WEB / "index.html").read_text("utf-8")))
    assert named >= {"ui/app.js", "ui/style.css", "ui/early.js", "ui/icon.svg"}
    for script in SCRIPTS:
        named |= {f"ui/{name}" for name in re.findall(r'from "\./([^"]+)"', (WEB / script).read_text("utf-8"))}
    assert {name.removeprefix("ui/") for name in named} == set(FILES) - {"index.html"}


def test_the_document_has_no_script_and_no_style_of_its_own() -> None:
    document = (WEB / "index.html").read_text("utf-8")
    assert not re.search(r"<style|<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", document)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_makes_elements_or_code_of_text(script: str) -> None:
    source = (WEB / script).read_text("utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|srcdoc|\beval\(|new Function|import\(",
        source,
    )


class Numbers(HTMLParser):
    """The ranges of the number fields of a document, by name: least, most, and whether the least is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: dict[str, tuple[float, float, bool]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("type") == "number":
            name, least, most = found["name"], found["min"], found["max"]
            assert name
            assert least
            assert most
            self.ranges[name] = (float(least), float(most), "data-above" in found)


def test_the_settings_take_what_the_server_takes() -> None:
    document = Numbers()
    document.feed((WEB / "index.html").read_text("utf-8"))
    fields = ChatRequest.model_json_schema()["properties"]
    for name, (least, most, above) in document.ranges.items():
        [number] = [one for one in fields[name].get("anyOf", [fields[name]]) if one.get("type") != "null"]
        if name == "seed":  # only those that a browser's numbers can tell from each other
            assert (least, most) == (-(2**53) + 1, 2**53 - 1)
            assert number["minimum"] < least < most < MAX_SEED
        else:
            assert (least, most) == (number.get("exclusiveMinimum", number.get("minimum")), number["maximum"]), name
            assert above == ("exclusiveMinimum" in number), name
    assert set(document.ranges) == {"temperature", "top_p", "top_k", "max_tokens", "seed"}


def strings() -> dict[str, list[str]]:
    """The table of ``strings.js``, which is written so that Python can read it too."""
    [table] = re.findall(r"^const STRINGS = (\{.*?^\});$", (WEB / "strings.js").read_text("utf-8"), re.M | re.S)
    found: dict[str, list[str]] = ast.literal_eval(table)
    return found


def test_every_text_is_there_in_both_languages_with_the_same_blanks() -> None:
    for key, texts in strings().items():
        assert len(texts) == 2, key
        blanks = [sorted(re.findall(r"\{\d\}", text)) for text in texts]
        assert all(texts), key
        assert blanks[0] == blanks[1], key


def test_every_text_is_used_and_every_one_that_is_used_is_there() -> None:
    sources = {name: (WEB / name).read_text("utf-8") for name in FILES if name.endswith((".js", ".html"))}
    used = set(re.findall(r'data-(?:text|label|placeholder)="([^"]+)"', sources["index.html"]))
    prefixes: set[str] = set()
    for name, source in sources.items():
        if name.endswith(".js") and name != "strings.js":
            used |= set(re.findall(r'(?:text|string|fact)\("([\w.]+)"', source))
            used |= {key for key in strings() if f'"{key}"' in source}
            prefixes |= set(re.findall(r"text\(`([\w.]+\.)\$\{", source))
    assert used <= set(strings())
    unused = {key for key in set(strings()) - used if not key.startswith(tuple(prefixes))}
    assert unused == set()
