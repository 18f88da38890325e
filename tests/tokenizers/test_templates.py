"""Untrusted chat templates: the sandbox, and the limits of its child process."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo.errors import TemplateError
from zoo.tokenizers import chat, template_process

FORBIDDEN = {
    "class": "{{ ''.__class__.__mro__ }}",
    "attr filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "function": "{{ strftime_now.__code__ }}",
    "namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "items": "{{ namespace.__init__['__globals__'] }}",
    "include": "{% include 'passwd' %}",
    "import": "{% import 'os' as os %}",
    "mutation": "{{ messages.append(1) }}",
    "refusal": "{{ raise_exception('roles must alternate') }}",
    "syntax": "{% for %}",
    "undefined": "{{ nothing.at.all }}",
    "sum": "{{ 'a' + 1 }}",
    "range": "{{ range(10**9) }}",
    "digits": "{{ 10 ** 5000 }}",
    "recursive loop": "{% for i in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}",
    "recursive macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "nested lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "nested ifs": "{% if 1 %}" * 5000,
    "length": "{{ 1 }}" + "x" * 10**6,
}


def doubled(value: str, name: str = "n") -> str:
    """A namespace's `s`, doubled forty times."""
    start = f"{{% set {name} = namespace(s={value}) %}}"
    again = f"{{% set {name}.s = [{name}.s, {name}.s] %}}"
    return f"{start}{{% for i in range(40) %}}{again}{{% endfor %}}"


LISTS = doubled("[1]")
BOTH = LISTS + doubled("[1]", "m")
LONG = "{% set s = 'a' * 999999 %}"
MANY = "{% for i in range(99999) %}"
ENDLESS = {
    "loops": MANY * 2 + "{% endfor %}" * 2,
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "equality of shared lists": BOTH + "{{ n.s == m.s }}",
    "membership of shared lists": BOTH + "{{ n.s in [m.s] }}",
    "order of shared lists": BOTH + "{{ [n.s, m.s]|sort }}",
    "text of shared lists": LISTS + "{{ n.s }}",
    "joined text of shared lists": LISTS + "{{ n.s ~ '' }}",
    "json of shared lists": LISTS + "{{ n.s|tojson }}",
    "json of shared mappings": LISTS.replace("[n.s, n.s]", "{'a': n.s, 'b': n.s}")
    + "{{ n.s|tojson }}",
    "pprint of shared lists": LISTS + "{{ n.s|pprint }}",
    "escape of shared lists": LISTS + "{{ n.s|e }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set n = namespace(s=3) %}" + MANY + "{% set n.s = n.s * n.s %}{% endfor %}",
    "ranges": MANY + "{% set x = range(99999)|sum %}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**7) }}",
    "cycler": "{% set c = cycler(1, 2) %}" + MANY * 2 + "{{ c.next() }}" + "{% endfor %}" * 2,
    "wordwrap": LONG + "{{ s|wordwrap(1, wrapstring=s) }}",
    "title": LONG + MANY + "{% set x = s|title %}{% endfor %}",
    "split": LONG + MANY + "{% set x = s.split('a') %}{% endfor %}",
    "striptags": "{% set s = '<!--' * 199999 %}" + MANY + "{% set x = s|striptags %}{% endfor %}",
    "urlize": "{% set s = 'a@' * 199999 %}" + MANY + "{% set x = s|urlize %}{% endfor %}",
    "many expressions": "{{ a }}" * 37000,
    "a long sum": "{{ " + "1+" * 99999 + "1 }}",
}
LARGE = {
    "repeated text": "{{ 'a' * 10**10 }}",
    "repeated list": "{{ [0] * 10**10 }}",
    "center": "{{ 'a'|center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "expandtabs": "{{ ('\\t' * 9999).expandtabs(10**6) }}",
    "indent": "{{ ('a\\n' * 99999)|indent(10**6) }}",
    "width": "{{ '%9999999999d' % 1 }}",
    "width as an argument": "{{ '%*d' % (2**31 - 2, 1) }}",
    "format": "{{ '{:9999999999}'.format(1) }}",
    "format's inner width": "{{ '{:{}}'.format(1, 9999999999) }}",
    "format_map": "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
    "precision": "{{ '{:.2000000000f}'.format(1.0) }}",
    "json indent": "{{ [[1]]|tojson(indent=10**9) }}",
    "json separators": LONG + "{{ range(9999)|list|tojson(separators=(s, s)) }}",
    "translate": LONG + "{{ s.translate({97: s}) }}",
    "replace": LONG + "{{ s.replace('a', s) }}",
    "replace filter": LONG + "{{ s|replace('a', s) }}",
    "join": LONG + "{{ [s, s]|join(s)|list|join(s) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "doubled by ~": "{% set n = namespace(s='ab') %}"
    + MANY
    + "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubled by +": "{% set n = namespace(s=[1]) %}"
    + MANY
    + "{% set n.s = n.s + n.s %}{% endfor %}",
    "doubled by a block": "{% set n = namespace(s='ab') %}"
    + MANY
    + "{% set s %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = s %}{% endfor %}",
    "xmlattr": LONG
    + "{% set n = namespace(d={}) %}"
    + MANY
    + "{% set n.d = dict(n.d, **{'a' ~ i: s ~ i}) %}{% endfor %}{{ n.d|xmlattr }}",
    "output": LONG + MANY + "{{ s }}{% endfor %}",
}


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    chat._close_all()


def rendered(template: str, **variables: object) -> str:
    return chat.render(
        template, {"messages": [{"role": "user", "content": "x"}], **variables}, "here"
    )


def test_values_pass_through_a_template_unchanged() -> None:
    values = {"a": [1, 2.5, None, True, -0.0, "é\ud800", {"b": 10**30}], 3: float("inf")}
    assert json.loads(rendered("{{ x.a|tojson }}", x=values)) == values["a"]
    shown = rendered("{{ x.a[4] }} {{ x[3] }} {{ x.a[5] }} {{ x.a[6].b }}", x=values)
    assert shown == f"-0.0 inf é\ud800 {10**30}"
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(TemplateError, match="here: the messages or variables nest too deeply"):
        rendered("{{ 1 }}", x=deep)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_forbidden_operations_of_templates_are_refused(name: str) -> None:
    with pytest.raises(TemplateError, match=r"^here: ") as caught:
        rendered(FORBIDDEN[name])
    assert "takes more than" not in str(caught.value)


@pytest.mark.parametrize("name", [*ENDLESS, *LARGE])
def test_hostile_template_runs_into_a_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a shorter limit, so that the test is faster."""
    monkeypatch.setattr(template_process, "SECONDS", 0.05 if name in ENDLESS else 2.0)
    message = "of processor time" if name in ENDLESS else "40 MB of memory"
    with pytest.raises(TemplateError, match=f"^here: takes more than .*{message}"):
        rendered((ENDLESS | LARGE)[name])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits of memory are Linux's")
def test_memory_of_hostile_templates_is_limited(root: Path) -> None:
    code = f"""
import resource
from zoo.errors import TemplateError
from zoo.tokenizers.chat import render
for template in {[LARGE[n] for n in ("translate", "doubled by +", "output", "join")]!r}:
    try:
        print(len(render(template, {{}}, "here")))
    except TemplateError:
        pass
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10)
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) <= 64  # MB


def test_limits_grow_with_the_conversation() -> None:
    text = "ü😀" * 3_000_000  # four bytes a character, in memory and in the pipe
    assert len(rendered("{{ m ~ '!' }}", m=text)) == len(text) + 1
    with pytest.raises(TemplateError, match="makes a text of 18000000 characters; the limit is"):
        rendered("{{ m }}{{ m }}{{ m }}", m=text)


def test_every_filter_is_available() -> None:
    assert rendered("{{ 'a'|center(3) }}|{{ '%s-%s'|format(1, 2) }}") == " a |1-2"
    assert (
        rendered("{{ 'abc defghijkl'|truncate(5, true) }}|{{ 'ab'|wordwrap(1) }}") == "ab...|a\nb"
    )


def test_one_process_renders_all_texts_of_a_template() -> None:
    assert [rendered("{{ n }}!", n=n) for n in range(3)] == ["0!", "1!", "2!"]
    (renderer,) = chat._idle
    with pytest.raises(TemplateError, match="has no attribute 'a'"):
        rendered("{{ n }}!" + "{{ n.a.b }}", n=1)
    assert len(chat._idle) == 2  # it refused the text, and is reused
    for n in range(chat.MOST_IDLE + 1):
        rendered(f"{n}")
    assert len(chat._idle) == chat.MOST_IDLE and renderer not in chat._idle
    assert renderer._process.poll() is not None


def test_a_dead_process_is_replaced() -> None:
    assert rendered("{{ n }}", n=1) == "1"
    chat._idle[0]._process.kill()
    chat._idle[0]._process.wait()
    assert rendered("{{ n }}", n=2) == "2" and len(chat._idle) == 1


def test_a_process_that_exceeded_a_limit_is_not_reused() -> None:
    template = "{{ 'a' * n }}"
    assert rendered(template, n=3) == "aaa"
    with pytest.raises(TemplateError, match="of memory"):
        rendered(template, n=10**10)
    assert not chat._idle
    assert rendered(template, n=2) == "aa"


def test_templates_render_in_threads() -> None:
    texts: dict[int, str] = {}

    def render(n: int) -> None:
        texts[n] = rendered("{% for i in range(999) %}{{ n }}{% endfor %}", n=n)

    threads = [threading.Thread(target=render, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {n: str(n) * 999 for n in range(6)}
    assert 1 <= len(chat._idle) <= chat.MOST_IDLE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_children_of_its_own(root: Path) -> None:
    code = """
import os
from zoo.tokenizers.chat import render
print(render("{{ n }}", {"n": "before"}, "here"), flush=True)
if not (child := os.fork()):
    print(render("{{ n }}", {"n": "child"}, "here"), flush=True)
    raise SystemExit
os.waitpid(child, 0)
print(render("{{ n }}", {"n": "parent"}, "here"), flush=True)
"""
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, timeout=300)
    assert (done.stdout.split(), done.stderr) == (["before", "child", "parent"], "")


def test_an_interrupted_reply_does_not_answer_the_next_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert rendered("{{ n }}", n=1) == "1"

    def interrupted(request: bytes) -> tuple[bytes, str]:
        raise KeyboardInterrupt

    (renderer,) = chat._idle
    monkeypatch.setattr(renderer, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rendered("{{ n }}", n=2)
    assert renderer._process.poll() is not None
    assert rendered("{{ n }}", n=3) == "3"


def test_the_process_does_not_get_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither secrets, nor other paths of modules."""
    (tmp_path / "jinja2.py").write_text("raise SystemExit(3)")
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert rendered("{{ 1 }}") == "1"
    place = Path(f"/proc/{chat._idle[0]._process.pid}/environ")
    if place.exists():
        assert (
            b"secret" not in place.read_bytes() and str(tmp_path).encode() not in place.read_bytes()
        )


def test_a_process_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(TemplateError, match="its process does not start: /nowhere/python"):
        rendered("{{ 1 }}")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TemplateError, match="ended without a text, with status 1"):
        rendered("{{ 1 }}")


def test_an_idle_process_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "idle.py").write_text("import time\ntime.sleep(1000)")
    monkeypatch.setattr(chat, "WALL_SECONDS", 0.2)
    monkeypatch.setattr(template_process, "__file__", str(tmp_path / "idle.py"))
    with pytest.raises(TemplateError, match="ended without a text"):
        rendered("{{ 1 }}")
