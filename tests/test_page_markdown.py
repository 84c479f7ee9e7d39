"""The page's Markdown: what becomes of what models write, whole or piece by piece, in linear time."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from browser import ui
from playwright.sync_api import Browser, Page
from serving_processes import Serving

pytestmark = pytest.mark.slow

# Shows texts one after another in one place, as while they stream; what then stands there, but for icons.
SHOW = """async (sources) => {
    const {showMarkdown} = await import('/ui/markdown.js');
    const place = document.createElement('div');
    for (const source of sources) showMarkdown(place, source);
    const details = / (target|rel|type|tabindex|data-copy)="[^"]*"/g;
    return place.innerHTML.replaceAll(/<svg.*?<\\/svg>/g, '').replaceAll(details, '');
}"""


@pytest.fixture(scope="module")
def page(browser: Browser, standin: Serving) -> Iterator[Page]:
    """A page of the server whose scripts are tried."""
    with ui(browser, standin.url) as opened:
        yield opened.open().page


def code(language: str, content: str) -> str:
    caption = f'<figcaption><span>{language}</span><button class="quiet">Copy code</button></figcaption>'
    return f'<figure class="code">{caption}<pre><code>{content}</code></pre></figure>'


def heading(level: int, content: str) -> str:
    return f'<div role="heading" aria-level="{level + 2}" class="h{level}">{content}</div>'


def box(label: str) -> str:
    checked = ' checked=""' if label == "Done" else ""
    return f'<input disabled=""{checked} aria-label="{label}">'


CASES = {
    "": "",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# A\n###### B #\n#no": heading(1, "A") + heading(6, "B") + "<p>#no</p>",
    "*a* _b_ **c** __d__ ~~e~~ ***f***": "<p><em>a</em> <em>b</em> <strong>c</strong> <strong>d</strong> <del>e</del> "
    "<strong><em>f</em></strong></p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "2 * 3 * 4, snake_case_name, a** b, 5 ~ 6": "<p>2 * 3 * 4, snake_case_name, a** b, 5 ~ 6</p>",
    "**open": "<p>**open</p>",
    "**中文**后面": "<p><strong>中文</strong>后面</p>",
    r"\*a\* \\ \[x](y) \q": r"<p>*a* \ [x](y) \q</p>",
    "`a*b` `` c`d `` `open": "<p><code>a*b</code> <code>c`d</code> `open</p>",
    "*a `*` b*": "<p><em>a <code>*</code> b</em></p>",
    "&copy; &#65;&#x1F642; &Omega;&ne;&#39;": "<p>© A🙂 Ω≠'</p>",
    "&#0;&#xD800;&#9999999; &constructor; &#x; &amp": "<p>\ufffd\ufffd\ufffd &amp;constructor; &amp;#x; &amp;amp</p>",
    "`&copy;` &#60;b&#62; &#42;a&#42;": "<p><code>&amp;copy;</code> &lt;b&gt; *a*</p>",
    "&lt;b&gt; &amp;amp; &nope;": "<p>&lt;b&gt; &amp;amp; &amp;nope;</p>",
    "a  \nb\\\nc": "<p>a  <br>b<br>c</p>",
    "---\n***\n- - -": "<hr><hr><hr>",
    "A *b*\n===\ntext": heading(1, "A <em>b</em>") + "<p>text</p>",
    "one\ntwo\n  ---  \n\n---": heading(2, "one<br>two") + "<hr>",
    "- a\n---\n> b\n---\n\n==": "<ul><li>a</li></ul><hr><blockquote><p>b</p></blockquote><hr><p>==</p>",
    "- a\n==\n- b\n  --": f"<ul><li>a</li></ul><p>==</p><ul><li>{heading(2, 'b')}</li></ul>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "- a\n- b\n  - c\n    - d\n- e": "<ul><li>a</li><li>b<ul><li>c<ul><li>d</li></ul></li></ul></li><li>e</li></ul>",
    "- a\n\t- b": "<ul><li>a<ul><li>b</li></ul></li></ul>",
    "1. a\n2. b\n   more\n\n   second\n3. c": "<ol><li>a</li><li>b<br>more<p>second</p></li><li>c</li></ol>",
    "- [ ] a\n- [x] **b**\n  - [X] c\n- [y] d\n- [ ]": f'<ul><li class="task">{box("To do")}a</li><li class="task">'
    f'{box("Done")}<strong>b</strong><ul><li class="task">{box("Done")}c</li></ul></li><li>[y] d</li><li>[ ]</li></ul>',
    "1. [x] a": f'<ol><li class="task">{box("Done")}a</li></ol>',
    "7) a\n8) b": '<ol start="7"><li>a</li><li>b</li></ol>',
    "1. a\n  - b\n2. c": "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>",
    "text\n- a\n\nIn\n1984. No list": "<p>text</p><ul><li>a</li></ul><p>In<br>1984. No list</p>",
    "1. a\n   ```sh\n   x\n     y\n   ```\n2. b": f"<ol><li>a{code('sh', 'x' + chr(10) + '  y')}</li><li>b</li></ol>",
    "```py\n\tx = '<b>'\n\n```\nafter": code("py", "\tx = '&lt;b&gt;'\n") + "<p>after</p>",
    "````\n```\n````": code("", "```"),
    "~~~js\nopen\n**x**": code("js", "open\n**x**"),
    "| a | b |\n|---|--:|\n| 1 | `x\\|y` |\n| 2 |\n\nz": '<div class="table"><table><thead><tr><th>a</th>'
    '<th class="align-right">b</th></tr></thead><tbody><tr><td>1</td><td class="align-right"><code>x|y</code></td></tr>'
    '<tr><td>2</td><td class="align-right"></td></tr></tbody></table></div><p>z</p>',
    "a | b\nc | d": "<p>a | b<br>c | d</p>",
    '[a **b**](https://test/y_(z) "t").': '<p><a href="https://test/y_(z)">a <strong>b</strong></a>.</p>',
    "![alt](https://test/i.png)": '<p><a href="https://test/i.png">alt</a></p>',
    "see https://test/a_b. (http://test/q)": '<p>see <a href="https://test/a_b">https://test/a_b</a>. '
    '(<a href="http://test/q">http://test/q</a>)</p>',
    "<https://test/a_b.> <HTTP://test/?q=*x*>": '<p><a href="https://test/a_b.">https://test/a_b.</a> '
    '<a href="http://test/?q=*x*">HTTP://test/?q=*x*</a></p>',
    "<https://> <javascript:x> <ftp://test/> <a@test> [<https://test/b>](https://test/c)": "<p>&lt;https://&gt; "
    '&lt;javascript:x&gt; &lt;ftp://test/&gt; &lt;a@test&gt; <a href="https://test/c">&lt;https://test/b&gt;</a></p>',
    "见https://test/，好": "<p>见https://test/，好</p>",  # noqa: RUF001
    "[a](javascript:x) [b](/c) [d] [e]: f": "<p>[a](javascript:x) [b](/c) [d] [e]: f</p>",
    "<b>x</b>": "<p>&lt;b&gt;x&lt;/b&gt;</p>",
}


@pytest.mark.parametrize("source", CASES)
def test_markdown_becomes_elements(page: Page, source: str) -> None:
    assert page.evaluate(SHOW, [source]) == CASES[source]


@pytest.mark.parametrize("source", CASES)
def test_piece_by_piece_it_becomes_the_same(page: Page, source: str) -> None:
    assert page.evaluate(SHOW, [source[:end] for end in range(len(source) + 1)]) == CASES[source]


def test_any_text_in_any_pieces_becomes_what_it_becomes_whole(page: Page) -> None:
    random.seed(20)
    marks = ["*", "**", "_", "`", "```", "~~", "\n", "\n\n", "- ", "1. ", "> ", "|", "|---|", "# ", "[", "](https://test)",
             "<b>", "\\", "&lt;", "  ", "    ", "\t", "word", "中文", "https://test ", "\r\n", "🙂",
             "<https://test>", "==", "---", "[ ] ", "[x] "]  # fmt: skip
    for _ in range(300):
        source = "".join(random.choices(marks, k=random.randint(1, 40)))
        cuts = sorted(random.sample(range(len(source) + 1), k=min(5, len(source))))
        pieces = [source[:cut] for cut in cuts] + [source]
        assert page.evaluate(SHOW, pieces) == page.evaluate(SHOW, [source]), source


UNITS = "* · **a · *a  · _a · ` · `` `  · [ · [a]( · ![ · >  · > · -  · | · | a\n · ~ · ```\n · #  · "
UNITS += "\\ · & · https://[ · h · "
UNITS += "<https:// · <https://test> · &# · &copy · a\n== · -- · - [ ] · "
UNITS += '  · \n · < · *` · 1. \n · a*b** · [a](x " · # · - · \t- a\n'


@pytest.mark.parametrize("unit", UNITS.split(" · "))
@pytest.mark.timeout(30)
def test_nothing_takes_more_than_linear_time(page: Page, unit: str) -> None:
    # At this length, quadratic time is minutes.
    source = unit * (200_000 // len(unit))
    for text in (source, f"a | b\n{source}x", f"{source}x"):
        page.evaluate(SHOW, [text])
