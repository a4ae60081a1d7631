"""Templates of strangers, rendered in bounds: Jinja's sandbox, and no more time and text than a conversation takes.

Jinja's `ImmutableSandboxedEnvironment` keeps a template from Python's insides and from changing what it is shown. It
does not keep one from looping for years, or from doubling a text until the memory is full. Here every value that a
template makes is weighed when it is made, what it makes piece by piece at each piece, each turn of a loop and each call
is counted, and what would make much of little (powers, repetitions, padding) is refused before it is done.

Chat templates are given what transformers gives them (`render_jinja_template` in its `chat_template_utils.py`, 5.23):
its blocks' white space, `tojson`, `raise_exception`, `strftime_now`, and the tag {% generation %}. A test holds both
equal, but for the date, which is `TODAY`.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import datetime
from types import GeneratorType
from typing import Any

from jinja2 import TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["TODAY", "BoundedTemplate"]

#: What templates are told that today is. A date that passes would give the same rows other tokens tomorrow: records
#: would not replay, and a run that is gone on with would mix two prompts. It is the one that the templates of Llama 3
#: take where there is no `strftime_now`.
TODAY = datetime(2024, 7, 26)

#: Turns of loops and calls of macros in one rendering, and the seconds that it may take.
MAX_TURNS = 100_000
MAX_SECONDS = 10.0

#: Characters that a value may have, and how many times those of what a template is shown.
MAX_SIZE, MAX_GROWTH = 1_000_000, 50

#: Characters of a template; real ones have some thousands.
MAX_TEMPLATE = 1_000_000

#: Widths, counts and indents that a template may name.
_MAX_WIDTH = 1000

#: Bits of a whole number.
_MAX_BITS = 4096

#: By which Jinja knows a filter that wants its context.
_PASSES_CONTEXT = "jinja_pass_arg"

#: What a template may call of Python's own values; each gives about as much as it is given.
_METHODS = frozenset(
    {
        *("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "partition", "rpartition", "startswith"),
        *("endswith", "upper", "lower", "title", "capitalize", "swapcase", "casefold", "removeprefix", "removesuffix"),
        *("find", "rfind", "index", "rindex", "count", "isdigit", "isdecimal", "isnumeric", "isalpha", "isalnum"),
        *("isspace", "isupper", "islower", "istitle", "isidentifier", "get", "items", "keys", "values", "copy"),
        *("ljust", "rjust", "center", "zfill", "replace", "join", "format", "is_integer"),
    }
)

#: Jinja's filters that are not there: they make much of little, or markup that no chat has.
_NO_FILTERS = ("filesizeformat", "forceescape", "pprint", "random", "striptags", "urlize", "xmlattr")

#: Those of Jinja's filters that make much of little where what they are given is; `tojson` writes in pieces instead.
_CHECKED_FILTERS = frozenset({"format", "indent", "join", "replace", "wordwrap"})


class BoundedTemplate:
    """A stranger's template.

    Args:
        source: Jinja.
        is_chat: Whether it is a chat template, and gets what transformers gives those.

    Raises:
        TemplateError: It does not compile.
    """

    def __init__(self, source: str, *, is_chat: bool = False) -> None:
        if len(source) > MAX_TEMPLATE:
            raise SecurityError(f"it has {len(source):,} characters; a template has at most {MAX_TEMPLATE:,}")
        self._environment = _Bounded(is_chat)
        self._lock = threading.Lock()
        try:
            self._template = self._environment.from_string(source)
        except RecursionError as error:
            raise SecurityError("its expressions are nested too deeply") from error

    def render(self, **shown: Any) -> str:
        """Return the text.

        Raises:
            TemplateError: The template fails, or asks for more than its bounds.
        """
        return self.render_marked(**shown)[0]

    def render_marked(self, **shown: Any) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and of each part marked as generated its first character and the one after its last.

        Raises:
            TemplateError: As `render`.
        """
        with self._lock:  # the account is one
            return self._rendered(shown)

    def _rendered(self, shown: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        environment = self._environment
        environment.begin(shown)
        context = self._template.new_context(shown)
        try:
            for part in self._template.root_render_func(context):
                environment.written.append(part)
                environment.written_size += len(part)
                environment.require(environment.written_size)
        except TemplateError:
            raise
        except RecursionError as error:
            raise SecurityError("it calls itself too deeply") from error
        except Exception as error:  # whatever a template makes Python stumble over
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        return "".join(environment.written), environment.marks


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with an account of what a rendering takes."""

    intercepted_binops = frozenset({"+", "*", "%", "**", "-", "/", "//"})

    def __init__(self, is_chat: bool) -> None:
        if is_chat:
            super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
            self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
            self.filters["tojson"] = self._tojson
        else:
            super().__init__(keep_trailing_newline=True)
        self.globals |= {"dict": _plain_dict, "namespace": _PlainNamespace}
        del self.globals["lipsum"]
        for name in _NO_FILTERS:
            del self.filters[name]
        self.filters = {name: self._weighed_filter(name, function) for name, function in self.filters.items()}
        self.policies["json.dumps_function"] = self._dumped
        self.finalize = self.weighed
        self.concat = self._concat  # type: ignore[method-assign]
        self.begin({})

    def begin(self, shown: Mapping[str, Any]) -> None:
        """Begin a rendering's account."""
        self.written: list[str] = []
        self.written_size = 0
        self.marks: list[tuple[int, int]] = []
        self._turns = 0
        self._deadline = time.monotonic() + MAX_SECONDS
        self._most = 2**62
        self._most = MAX_SIZE + MAX_GROWTH * _weight(list(shown.values()), 2**40)

    def require(self, size: int) -> None:
        """Refuse a value of more characters than the rendering may make."""
        if size > self._most:
            raise SecurityError(f"it makes more than {self._most:,} characters")

    def turn(self) -> None:
        """Count a turn of a loop, or a call."""
        self._turns += 1
        if self._turns > MAX_TURNS:
            raise SecurityError(f"it takes more than {MAX_TURNS:,} turns")
        if self._turns % 64 == 0 and time.monotonic() > self._deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")

    def weighed(self, value: Any) -> Any:
        """Return a value, if it is not too large."""
        self.require(_weight(value, self._most))
        return value

    def joined(self, *values: Any) -> str:
        """Return values as one text."""
        self.require(_weight(values, self._most))
        return self._concat(map(str, values))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls, if it makes no more of its arguments than it may."""
        __self.turn()
        __self.weighed([args, kwargs])
        wrapped = getattr(__obj, "__wrapped__", None)  # str.format comes wrapped
        owner = getattr(__obj, "__self__", getattr(wrapped, "__self__", None))
        if isinstance(owner, (str, bytes, int, float, list, tuple, dict)):
            args = __self._checked_arguments(owner, __obj.__name__, args, kwargs)
        return __self.weighed(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Reckon what a template reckons."""
        self.turn()
        sizes = [_weight(value, self._most) for value in (left, right)]
        numbers = [value.bit_length() for value in (left, right) if isinstance(value, int)]
        if operator == "**" and not (isinstance(right, int) and abs(right) <= 64 and sum(numbers) <= 64):
            raise SecurityError("it raises to a power that is not small")
        if operator == "*":
            count = next((value for value in (left, right) if isinstance(value, int)), 1)
            self.require(sum(sizes) if len(numbers) == 2 else max(count, 0) * max(sizes))
            if len(numbers) == 2 and sum(numbers) > _MAX_BITS:
                raise SecurityError("it multiplies numbers that are not small")
        if operator == "%" and isinstance(left, str):
            self._check_format(left, sizes[1])
        if operator == "+":
            self.require(sum(sizes))
        return self.weighed(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = Parser(self, source, name, filename).parse()
        _bound(tree, self)
        return tree

    def _concat(self, parts: Iterable[str]) -> str:
        found, size = [], 0
        for part in parts:
            size += len(part)
            self.require(size)
            found.append(part)
        return "".join(found)

    def _weighed_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that is counted, and whose result is weighed."""
        signature = inspect.signature(function) if name in _CHECKED_FILTERS else None

        def weighed(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            # Jinja puts its own context before the value where the function is marked for it.
            values = [value for value in args if not isinstance(value, (Context, nodes.EvalContext, _Bounded))]
            self.weighed([values, kwargs])
            rest = [*values[1:], *kwargs.values()]
            if any(isinstance(value, int) and abs(value) > _MAX_WIDTH for value in rest):
                raise SecurityError(f"{name} is asked for more than {_MAX_WIDTH}")
            if signature is not None:
                bound = signature.bind(*args, **kwargs)
                self._check_filter(name, bound.arguments)
                args, kwargs = bound.args, bound.kwargs
            result = self.weighed(function(*args, **kwargs))
            return self._weighed_pieces(result) if isinstance(result, GeneratorType) else result

        if hasattr(function, _PASSES_CONTEXT):
            setattr(weighed, _PASSES_CONTEXT, getattr(function, _PASSES_CONTEXT))
        return weighed

    def _weighed_pieces(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield values that are made one by one, if all together are not too large for whoever puts them away."""
        size = 0
        for value in values:
            size += _weight(value, self._most)
            self.require(size)
            yield value

    def _check_filter(self, name: str, given: dict[str, Any]) -> None:
        """Refuse what would make much of little.

        Args:
            name: One of `_CHECKED_FILTERS`.
            given: What it is given, by the names of its parameters; what is to be joined is a list or the like then.
        """
        if name == "join":
            given["value"] = self._joinable(str(given.get("d", "")), given["value"])
        elif name == "replace":
            self._check_replace(*(str(given[part]) for part in ("s", "old", "new")))
        elif name == "format":
            self._check_format(str(given["value"]), _weight([given.get("args"), given.get("kwargs")], self._most))
        elif name == "indent":
            width, text = given.get("width", 0), str(given["s"])
            width = width if isinstance(width, int) else len(str(width))
            self.require(len(text) + (len(text.splitlines()) + 1) * max(0, width))
        elif name == "wordwrap":
            self.require((len(str(given["s"])) + 1) * (1 + len(str(given.get("wrapstring") or ""))))

    def _checked_arguments(
        self, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Return what a method is called with; refuse methods that templates may not call, and much made of little."""
        if name not in _METHODS:
            raise SecurityError(f"it calls {name} of a {type(owner).__name__}, which templates may not")
        given = [*args, *kwargs.values()]
        if any(isinstance(value, int) and abs(value) > max(_MAX_WIDTH, len(str(owner))) for value in given):
            raise SecurityError(f"{name} is asked for more than {_MAX_WIDTH}")
        if name == "replace" and len(args) >= 2:
            self._check_replace(owner, str(args[0]), str(args[1]))
        elif name == "join" and args:
            return self._joinable(owner, args[0]), *args[1:]
        elif name == "format":
            self._check_format(owner, _weight(given, self._most))
        return args

    def _check_replace(self, text: str, old: str, new: str) -> None:
        self.require(len(text) + (text.count(old) if old else len(text) + 1) * len(new))

    def _joinable(self, between: str, values: Any) -> Any:
        """Return what is to be joined, as a list where nobody knows its length."""
        known = values if isinstance(values, Sized) else list(values)
        self.require(len(between) * len(known))
        return known

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """Return a value as JSON, as transformers writes it for chat templates."""
        return self._dumped(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def _dumped(self, value: Any, *, indent: Any = None, **settings: Any) -> str:
        """Return what `json.dumps` does, written in pieces and no further than it may grow."""
        if isinstance(indent, str) and len(indent) > _MAX_WIDTH:
            raise SecurityError(f"tojson is asked for more than {_MAX_WIDTH}")
        return self._concat(json.JSONEncoder(indent=indent, **settings).iterencode(value))

    def _check_format(self, form: str, size: int) -> None:
        if re.search(r"%[^%]*\*|\d{4,}|\{[^}]*\{", form):
            raise SecurityError("it formats to a width that is not small")
        self.require(len(form) + (form.count("%") + form.count("{")) * (_MAX_WIDTH + size))


def _bound(tree: nodes.Template, environment: _Bounded) -> None:
    """Have every turn counted, and every value weighed that is made without a call."""
    node: Any
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        counted: Any = nodes.ExprStmt(_call("turn", []))
        node.body.insert(0, counted.set_lineno(node.lineno))
    _weigh_made(tree)
    tree.set_environment(environment)


def _weigh_made(node: nodes.Node) -> None:
    """Put what weighs or joins around lists, dictionaries and concatenations, the inner ones first."""
    for name in node.fields:
        value = getattr(node, name)
        if isinstance(value, list):
            value[:] = [_weighing(item) if isinstance(item, nodes.Node) else item for item in value]
        elif isinstance(value, nodes.Node):
            setattr(node, name, _weighing(value))


def _weighing(node: nodes.Node) -> nodes.Node:
    _weigh_made(node)
    if isinstance(node, nodes.Concat):
        return _call("joined", list(node.nodes)).set_lineno(node.lineno)
    is_made = isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load")
    return _call("weighed", [node]).set_lineno(node.lineno) if is_made else node


def _call(name: str, args: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)


def _weight(value: Any, most: int) -> int:
    """Return about how many characters a value has as text, or a number beyond `most` where it has more."""
    total, waiting = 0, [value]
    while waiting and total <= most:
        item = waiting.pop()
        total += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() // 3
        elif isinstance(item, Mapping):
            waiting += item
            waiting += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting += item
        elif isinstance(item, Namespace):
            waiting.append(getattr(item, "_Namespace__attrs", {}))
        elif not isinstance(item, Undefined):
            total += 16
    return total


# What transformers gives chat templates


class _Generation(Extension):
    """The tag that marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return a block whose text is noted."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_noted"), [], [], body).set_lineno(line)

    def _noted(self, caller: Macro) -> str:
        environment: Any = self.environment
        text = str(caller())
        environment.marks.append((environment.written_size, environment.written_size + len(text)))
        return text


class _PlainNamespace(Namespace):
    """Names that a template sets; none of Python's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in dict(*args, **kwargs):
            _check_name(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores {name!r}; names that begin with _ are Python's own")


def _plain_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > _MAX_WIDTH or re.search(r"\d{3,}", form):
        raise SecurityError("it writes the time at a length that is not small")
    return TODAY.strftime(form)
